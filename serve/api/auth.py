"""API keys: who may ask.  Everything is denied by default; the open paths are listed here."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPBearer

from serve.errors import AuthenticationError

DOCUMENTED_SCHEMES = [
    Security(HTTPBearer(auto_error=False, description="The API key.")),
    Security(APIKeyHeader(name="X-API-Key", auto_error=False, description="The API key; wins over Authorization.")),
]
"""Tells OpenAPI, and so the documentation's pages, how to send a key.  The middleware does the checking."""

TRUSTED_CALLER = "trimaran.caller"
"""Scope key under which an adapter that drives the app in process names a caller whom its platform has authenticated.

Only code in this process can set it: no part of an HTTP request becomes a key of the scope.
"""

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


class KeyRing:
    """The accepted keys, kept as digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def is_empty(self) -> bool:
        """No key was configured: everyone may ask."""
        return not self._digests

    def identify(self, key: bytes) -> str:
        """A name for the key's owner that reveals nothing of the key.

        Compares with every key, each in constant time.

        Raises:
            AuthenticationError: no such key.
        """
        digest = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise AuthenticationError("this API key is not accepted; check it, or ask the operator for one")
        return "key-" + digest.hex()[:8]

    def caller(self, path: str, headers: Mapping[str, str]) -> str:
        """Who asks, by the key in ``headers`` (lower-case names).  ``X-API-Key`` wins over ``Authorization``.

        Raises:
            AuthenticationError: no key, or not an accepted one.
        """
        if path in OPEN_PATHS or self.is_empty:
            return "anonymous"
        key = _raw(headers.get("x-api-key", "")) or _from_authorization(
            headers.get("authorization", ""), accepts_basic(path)
        )
        key = key or _from_protocols(offered_protocols(headers))
        if not key:
            raise AuthenticationError("no API key: send Authorization: Bearer KEY, or X-API-Key: KEY")
        return self.identify(key)


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
