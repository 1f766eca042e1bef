"""API keys: what is known of each, the file that holds them, and who somebody is by a key.  No HTTP here.

Only digests are kept.  A key made by :func:`new_secret` is 256 random bits: a plain SHA-256 of it tells nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from serve.errors import AuthenticationError, ConfigError

logger = logging.getLogger(__name__)

HASHED = "sha256:"
"""Before the digest of a key in place of the key."""

MAX_KEYS = 1000
"""In one file: every request is compared with each of them."""

_NAME = re.compile(r"(?!key-|anonymous$)[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class Scope(StrEnum):
    """What a caller may do.  Documentation and version are for every caller."""

    INFERENCE = "inference"
    ADMIN = "admin"


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks: the name in logs, limits and records, what it may do, and the id of the key that showed it."""

    caller: str
    scopes: frozenset[Scope] = ALL_SCOPES
    key_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key.  Several with one name are one caller, so that a key can be exchanged while both live.

    Times are timezone-aware; ``name`` empty: the key is its own caller, under its id.
    """

    digest: bytes
    name: str = ""
    scopes: frozenset[Scope] = ALL_SCOPES
    created_at: datetime | None = None
    expires_at: datetime | None = None

    @property
    def id(self) -> str:
        """Names the key, and reveals nothing of it."""
        return f"key-{self.digest.hex()[:8]}"

    def is_expired(self, now: float) -> bool:
        """Whether it no longer counts, at seconds since the epoch."""
        return self.expires_at is not None and now >= self.expires_at.timestamp()


def new_secret() -> str:
    """A key that nobody has."""
    return "tri-" + secrets.token_hex(32)


def digest_of(secret: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(secret).digest()


def environment_key(text: str) -> ApiKey:
    """A key of ``SERVE_API_KEYS``: itself, or ``sha256:`` and its digest in hexadecimal digits.

    Raises:
        ConfigError: the digest is none.
    """
    if not text.startswith(HASHED):
        return ApiKey(digest=digest_of(text.encode()))
    return ApiKey(digest=_digest(text.removeprefix(HASHED), "SERVE_API_KEYS"))


def check_name(name: str) -> str:
    """A caller's name, if it can be one.

    Raises:
        ConfigError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:64]!r} is no name for a key: use up to 64 letters, digits and . _ @ -, "
            "not beginning with key-, and not anonymous"
        )
    return name


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file.

    Raises:
        ConfigError: it cannot be read, or what is wrong in it and where.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}: trimaran keys new --file {path} makes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    entries = cast("dict[str, Any]", found).get("keys") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f'{path} does not hold {{"keys": [...]}}')
    entries = cast("list[Any]", entries)
    if len(entries) > MAX_KEYS:
        raise ConfigError(f"{path} holds {len(entries)} keys; at most {MAX_KEYS} are possible")
    return [_key(entry, f"{path}: keys[{at}]") for at, entry in enumerate(entries)]


def write_keys(path: Path, keys: Iterable[ApiKey]) -> None:
    """Replace the file in one step; its owner and who may read it stay.  A new one is for its owner alone.

    Raises:
        ConfigError: it cannot be written.
    """
    text = json.dumps({"keys": [_entry(key) for key in keys]}, indent=2) + "\n"
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            if path.exists():
                before = path.stat()
                Path(name).chmod(before.st_mode & 0o777)
                with suppress(OSError):  # only root may give files away
                    os.chown(name, before.st_uid, before.st_gid)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _entry(key: ApiKey) -> dict[str, Any]:
    times = {"created_at": key.created_at, "expires_at": key.expires_at}
    return {
        "id": key.id,
        "name": key.name,
        "sha256": key.digest.hex(),
        "scopes": sorted(key.scopes),
        **{name: moment.isoformat() if moment else None for name, moment in times.items()},
    }


def _key(entry: Any, where: str) -> ApiKey:
    fields = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    unknown = set(fields) - {"id", "name", "sha256", "scopes", "created_at", "expires_at"}
    if "sha256" not in fields or unknown:
        raise ConfigError(f"{where} needs sha256" if not unknown else f"{where} has an unknown field {min(unknown)!r}")
    try:
        return ApiKey(
            digest=_digest(fields["sha256"], f"{where}.sha256"),
            name=check_name(fields["name"]) if fields.get("name") else "",
            scopes=frozenset(Scope(scope) for scope in fields.get("scopes", [Scope.INFERENCE])),
            created_at=_moment(fields.get("created_at")),
            expires_at=_moment(fields.get("expires_at")),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _digest(text: Any, where: str) -> bytes:
    with suppress(TypeError, ValueError):
        if len(digest := bytes.fromhex(text)) == hashlib.sha256().digest_size:
            return digest
    raise ConfigError(f"{where}: a SHA-256 has 64 hexadecimal digits")


def _moment(text: Any) -> datetime | None:
    if text is None:
        return None
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class KeyRing:
    """The accepted keys: the environment's, and those of a file that may change at any time.

    Args:
        fixed: Keys that count as long as the process lives.
        path: The file; None: there is none.
        clock: Seconds since the epoch.

    Raises:
        ConfigError: the file is wrong.
    """

    def __init__(
        self, fixed: Sequence[ApiKey] = (), path: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._fixed = fixed
        self._path = path
        self._clock = clock
        self._version = _version(path) if path else None
        self._complaint = ""
        self._keys = [*fixed, *(read_keys(path) if path else ())]

    @property
    def is_empty(self) -> bool:
        """No key was ever configured."""
        return not self._fixed and self._path is None

    def identify(self, secret: bytes) -> Identity:
        """Whose key this is.  Compares with every key, each in constant time.

        Raises:
            AuthenticationError: nobody's, or it has expired.
        """
        digest, found = digest_of(secret), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None:
            raise AuthenticationError("this API key is not accepted; check it, or ask the operator for one")
        if found.is_expired(self._clock()):
            raise AuthenticationError("this API key has expired; ask the operator for another")
        return Identity(found.name or found.id, found.scopes, found.id)

    def refresh(self) -> None:
        """Read the file again if it has changed; one that is wrong changes nothing, and is logged once.  Blocks.

        What is wrong may pass without a change of the file (its permissions, no more open files): it is tried again.
        """
        if self._path is None or ((version := _version(self._path)) == self._version and not self._complaint):
            return
        self._version = version
        try:
            keys = read_keys(self._path)
        except ConfigError as error:
            if error.message != self._complaint:
                logger.error("The keys stay as they were: %s", error.message)
            self._complaint = error.message
            return
        self._keys, self._complaint = [*self._fixed, *keys], ""
        logger.info("%d keys were read from %s", len(keys), self._path)


def _version(path: Path) -> tuple[int, ...] | None:
    """Differs once the file has changed, also behind a link as Kubernetes changes its secrets."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
