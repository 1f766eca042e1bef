"""API keys: who may ask.  Everything is denied by default; the open paths are listed here."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from serve.errors import AuthenticationError, PermissionDenied
from serve.keys import Identity, KeyRing, Scope

if TYPE_CHECKING:
    from serve.oidc import TokenVerifier

SCHEMES: Mapping[str, Mapping[str, str]] = {
    "HTTPBearer": {"type": "http", "scheme": "bearer", "description": "The API key."},
    "APIKeyHeader": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The API key; wins over Authorization.",
    },
}
"""Tells OpenAPI, and so the documentation's pages, how to send a key.  The middleware does the checking, and no route
declares one: FastAPI would look for the headers again, in every request.
"""

TRUSTED_CALLER = "trimaran.caller"
"""Scope key under which an adapter that drives the app in process names a caller whom its platform has authenticated.

Only code in this process can set it: no part of an HTTP request becomes a key of the scope.
"""

OIDC = "OpenIdConnect"
"""The scheme's name in OpenAPI."""

ANYONE = Identity("anonymous")

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/ping"})
"""Health for the platform, and the playground: a static page without data, which asks for the key itself."""

BASIC_PATHS = ("/docs", "/redoc", "/openapi.json")
"""A browser can only ask for a key in its HTTP Basic dialogue: the key is the password."""


def accepts_basic(path: str) -> bool:
    """Whether the key may come as the password of HTTP Basic."""
    return any(path == allowed or path.startswith(allowed + "/") for allowed in BASIC_PATHS)


def challenge(path: str) -> str:
    """The ``WWW-Authenticate`` of a 401.  One scheme only: Chromium does not ask when another is named beside Basic."""
    return 'Basic realm="the API key is the password"' if accepts_basic(path) else "Bearer"


REALTIME_PROTOCOL = "trimaran.chat.v1"
"""The WebSocket subprotocol of the chat; a browser offers it together with its key."""

KEY_PROTOCOL = "trimaran.key."
"""Begins a WebSocket subprotocol that carries the key in base64url: a browser can send no header of its own."""


def offered_protocols(headers: Mapping[str, str]) -> list[str]:
    """The subprotocols that a WebSocket's client offers."""
    return [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")]


ADMIN_PATHS = frozenset({"/metrics", "/usage"})
"""What tells of everybody's requests."""

PUBLIC_PATHS = ("/version", *BASIC_PATHS)
"""For every caller, whatever it may do."""


def needed_scope(path: str) -> Scope | None:
    """What a caller of this path must be allowed to do; None: nothing in particular."""
    if path in ADMIN_PATHS:
        return Scope.ADMIN
    if any(path == allowed or path.startswith(allowed + "/") for allowed in PUBLIC_PATHS):
        return None
    return Scope.INFERENCE


class Door:
    """Decides who may come in, by the key or the token that a request carries.

    Args:
        keys: The accepted keys.
        tokens: Verifies an issuer's tokens; None: there is no issuer.
    """

    def __init__(self, keys: KeyRing, tokens: TokenVerifier | None = None) -> None:
        self.keys = keys
        self.tokens = tokens

    @property
    def is_open(self) -> bool:
        """Neither keys nor an issuer were configured: everyone may ask."""
        return self.keys.is_empty and self.tokens is None

    async def identify(self, path: str, headers: Mapping[str, str]) -> Identity:
        """Who asks, by the key in ``headers`` (lower-case names).  ``X-API-Key`` wins over ``Authorization``.

        Raises:
            AuthenticationError: no key or token, or not an accepted one.
            PermissionDenied: an accepted one, which may not do this.
            IssuerUnavailable: nobody can tell whether the token is good.
        """
        if path in OPEN_PATHS or self.is_open:
            return ANYONE
        key = _raw(headers.get("x-api-key", "")) or _from_authorization(
            headers.get("authorization", ""), accepts_basic(path)
        )
        key = key or _from_protocols(offered_protocols(headers))
        if not key:
            raise AuthenticationError("no API key: send Authorization: Bearer KEY, or X-API-Key: KEY")
        is_token = self.tokens is not None and self.tokens.could_be(key)
        identity = await self.tokens.identify(key) if self.tokens and is_token else self.keys.identify(key)
        scope = needed_scope(path)
        if scope is not None and scope not in identity.scopes:
            shown = "token" if is_token else "API key"
            raise PermissionDenied(f"this {shown} lacks the scope {scope.value}; ask the operator for one with it")
        return identity


def security(path: str, door: Door) -> list[dict[str, list[str]]]:
    """What OpenAPI says of a path that needs a key: the scope with each scheme, the issuer's too if there is one."""
    scope = needed_scope(path)
    scopes = [scope.value] if scope is not None else []
    names = [*SCHEMES, *([OIDC] if door.tokens is not None else ())]
    return [{name: scopes} for name in names]


def oidc_scheme(discovery_url: str) -> dict[str, Any]:
    """OpenAPI's description of the issuer."""
    text = "A JWT of this issuer, as Authorization: Bearer. Its claim scope names inference, admin or both."
    return {"type": "openIdConnect", "openIdConnectUrl": discovery_url, "description": text}


def _raw(value: str) -> bytes:
    """The bytes that the client sent: ASGI servers decode headers as Latin-1."""
    return value.strip().encode("latin-1", errors="replace")


def _from_authorization(value: str, basic: bool) -> bytes:
    scheme, _, credentials = value.partition(" ")
    if scheme.lower() == "bearer":
        return _raw(credentials)
    if basic and scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _from_protocols(names: Iterable[str]) -> bytes:
    """The key that a WebSocket's client offers as a subprotocol; a plain request has none."""
    for name in names:
        if name.startswith(KEY_PROTOCOL):
            text = name.removeprefix(KEY_PROTOCOL).rstrip("=")
            try:
                return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            except (binascii.Error, ValueError):
                return b""
    return b""
