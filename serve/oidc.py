"""Bearer tokens of an OpenID Connect issuer: who somebody is by a JWT.  Needs the extra ``oidc``; no HTTP server here.

The issuer's public keys are fetched when the first token comes, and kept.  Algorithms are the operator's choice, never
the token's, and only those with a public key exist.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

import httpx2 as httpx

from serve.errors import AuthenticationError, ConfigError, IssuerUnavailable
from serve.keys import Identity, Scope
from serve.setting_values import is_loopback

logger = logging.getLogger(__name__)

ALGORITHMS = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)  # fmt: skip
FETCH_TIMEOUT_S = 5.0
FETCH_LIMIT_S = 10.0
"""For both documents together, however slowly they trickle in."""

MAX_DOCUMENT_BYTES = 2**20
MAX_TOKEN_BYTES = 16_384
KEYS_LIVE_S = 3600.0
"""After so long the keys are fetched again; those at hand count until others have come."""

REFETCH_S = 10.0
"""Between two fetches, however many tokens name unknown keys."""

MAX_SUBJECT = 120
"""Characters of a subject that are its caller's name; of a longer one fewer, and a hash of all of it."""


class TokenVerifier:
    """Verifies tokens of one issuer for one audience.  Belongs to the event loop.

    Args:
        issuer: Its address, exactly as tokens name it.
        audience: What tokens must be for.
        algorithms: Those that count; a subset of :data:`ALGORITHMS`.
        leeway_s: Seconds by which the issuer's clock and this one may differ.
        clock: Monotonic seconds.

    Raises:
        ConfigError: the package is missing, or a setting is unsafe.
    """

    def __init__(
        self,
        issuer: str,
        audience: str,
        algorithms: Sequence[str],
        leeway_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check(issuer, audience, algorithms)
        self.issuer = issuer
        self._audience = audience
        self._algorithms = list(algorithms)
        self._leeway_s = leeway_s
        self._clock = clock
        self._keys: dict[str, Any] = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._fetching = asyncio.Lock()
        self._renewing: asyncio.Task[None] | None = None

    @property
    def discovery_url(self) -> str:
        """Where the issuer describes itself."""
        return self.issuer.rstrip("/") + "/.well-known/openid-configuration"

    def could_be(self, credential: bytes) -> bool:
        """Whether this is a JWT rather than a key, by its looks."""
        return credential.startswith(b"eyJ") and credential.count(b".") == 2

    async def identify(self, token: bytes) -> Identity:
        """Whose token this is, and what it allows.

        Raises:
            AuthenticationError: it is not good; the reason is what PyJWT says, without the token.
            IssuerUnavailable: the issuer's keys are not at hand.
        """
        import jwt  # noqa: PLC0415

        if len(token) > MAX_TOKEN_BYTES:
            raise AuthenticationError(f"this token is longer than {MAX_TOKEN_BYTES} bytes")
        try:
            header = jwt.get_unverified_header(token)
            key = await self._key(header.get("kid"), header.get("alg"))
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=self._algorithms,
                audience=self._audience,
                issuer=self.issuer,
                leeway=self._leeway_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise AuthenticationError(f"this token is not accepted: {_plain(error)}") from None
        return Identity(_caller(claims["sub"]), _scopes(claims))

    async def _key(self, kid: object, algorithm: object) -> Any:
        """The issuer's key of this id; a token without one needs an issuer with just one key.

        Raises:
            AuthenticationError: the issuer has no such key, or the algorithm does not count.
        """
        if algorithm not in self._algorithms:
            raise AuthenticationError(f"this token is not accepted: its algorithm is not {_one_of(self._algorithms)}")
        name = kid if isinstance(kid, str) else None
        key = self._known(name)
        if key is None:
            await self._refresh()
            key = self._known(name)
        elif self._fetched_at is None or self._clock() - self._fetched_at > KEYS_LIVE_S:
            self._renew()
        if self._fetched_at is None:
            raise IssuerUnavailable("the issuer's keys cannot be fetched now; try again", retry_after=REFETCH_S)
        if key is None:
            raise AuthenticationError("this token is not accepted: its issuer has no key of that id")
        if key.algorithm_name != algorithm:
            raise AuthenticationError("this token is not accepted: its key is for another algorithm")
        return key

    def _known(self, name: str | None) -> Any:
        if name is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(name)

    def _renew(self) -> None:
        """Fetch the keys while nobody waits: an issuer that hangs must not stop those whose key is known."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        """Fetch the keys, once for all who wait, and not more often than every :data:`REFETCH_S` seconds."""
        async with self._fetching:
            now = self._clock()
            if self._tried_at is not None and now - self._tried_at < REFETCH_S:
                return
            self._tried_at = now
            try:
                async with asyncio.timeout(FETCH_LIMIT_S):
                    self._keys = await self._fetch()
                self._fetched_at = now
            except Exception as error:  # whatever an issuer may answer
                logger.warning("The keys of %s cannot be fetched: %s", self.issuer, _plain(error))

    async def _fetch(self) -> dict[str, Any]:
        import jwt  # noqa: PLC0415

        async with httpx.AsyncClient(timeout=FETCH_TIMEOUT_S, follow_redirects=False) as client:
            document = await _json(client, self.discovery_url)
            if document["issuer"] != self.issuer:
                raise ValueError(f"it calls itself {str(document['issuer'])[:200]!r}: set SERVE_OIDC_ISSUER to that")
            _check_address(document["jwks_uri"], "its jwks_uri")
            listed = (await _json(client, document["jwks_uri"]))["keys"]
        keys: dict[str, Any] = {}
        for at, entry in enumerate(cast("list[dict[str, Any]]", listed)):
            with suppress(Exception):  # one that nobody here needs, or that is none, must not take the others along
                if entry.get("use", "sig") == "sig" and entry.get("kty") in {"RSA", "EC", "OKP"}:
                    keys[str(entry.get("kid", at))] = jwt.PyJWK(entry)
        return keys


def _check(issuer: str, audience: str, algorithms: Sequence[str]) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("jwt", "cryptography")):
        raise ConfigError(
            "SERVE_OIDC_ISSUER needs the package PyJWT: pip install 'trimaran[oidc]' "
            "(an image: --build-arg EXTRAS=engine,oidc)"
        )
    try:
        _check_address(issuer, "SERVE_OIDC_ISSUER")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not audience:
        raise ConfigError("SERVE_OIDC_ISSUER needs SERVE_OIDC_AUDIENCE: tokens for others must not open this server")
    unsafe = sorted(set(algorithms) - ALGORITHMS)
    if unsafe or not algorithms:
        named = unsafe[0] if unsafe else "nothing"
        raise ConfigError(f"SERVE_OIDC_ALGORITHMS names {named}; there is {_one_of(sorted(ALGORITHMS))}")


def _check_address(address: str, what: str) -> None:
    parts = urlsplit(address)
    if not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))):
        raise ValueError(f"{what} is {address[:200]!r}: it must begin with https://")


async def _json(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    async with client.stream("GET", url) as response:
        if response.status_code != 200:
            raise ValueError(f"{url} answers {response.status_code}")
        data = b""
        async for chunk in response.aiter_bytes():
            data += chunk
            if len(data) > MAX_DOCUMENT_BYTES:
                raise ValueError(f"{url} answers more than {MAX_DOCUMENT_BYTES} bytes")
    found: Any = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError(f"{url} answers no JSON object")
    return cast("dict[str, Any]", found)


def _caller(subject: str) -> str:
    """The caller's name: no two subjects have the same, and none is longer than a log or a record holds."""
    if len(subject) <= MAX_SUBJECT:
        return f"sub:{subject}"
    digest = hashlib.sha256(subject.encode(errors="surrogatepass")).hexdigest()
    return f"sub:{subject[: MAX_SUBJECT - 20]}~{digest[:32]}"


def _scopes(claims: Mapping[str, Any]) -> frozenset[Scope]:
    """Of ``scope`` (RFC 8693) or ``scp`` (Microsoft's, Okta's), those that mean something here."""
    given: Any = claims.get("scope", claims.get("scp", ""))
    names = given.split() if isinstance(given, str) else cast("list[Any]", given) if isinstance(given, list) else []
    return frozenset(Scope(name) for name in names if name in set(Scope))


def _one_of(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _plain(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return (text[:1].lower() + text[1:])[:300]
