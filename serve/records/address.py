"""``SERVE_RECORDS_URL`` as SQLAlchemy's asynchronous drivers want it.  Imports no database package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from serve.errors import ConfigError

NAME = "SERVE_RECORDS_URL"
NEEDED = {"sqlite": ("sqlalchemy", "alembic", "aiosqlite"), "postgresql": ("sqlalchemy", "alembic", "asyncpg")}
SCHEMES = {"sqlite": "sqlite", "postgresql": "postgresql", "postgres": "postgresql"}
"""What users write; ``postgres`` is how some hosts print their addresses."""

FORMS = "use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"


def database_address(url: str) -> str:
    """The address with its driver; ``sslmode`` of a PostgreSQL address becomes asyncpg's ``ssl``.

    No error repeats the address: it may hold a password.

    Raises:
        ConfigError: no such kind of database, a parameter that nobody would obey, a folder that is not there, or a
            package that is not installed.
    """
    kind, rest = kind_of(url), url.partition("://")[2]
    if kind is None:
        raise ConfigError(f"{NAME} is no address of a database: {FORMS}", param=NAME)
    _check_installed(kind)
    if kind == "sqlite":
        return "sqlite+aiosqlite://" + _checked_file(rest)
    return "postgresql+asyncpg://" + _postgresql(rest, ssl_name="ssl")


def asyncpg_address(url: str) -> str:
    """The address of a PostgreSQL as asyncpg takes it without SQLAlchemy.

    Raises:
        ConfigError: as for :func:`database_address`.
    """
    database_address(url)
    return "postgresql://" + _postgresql(url.partition("://")[2], ssl_name="sslmode")


def kind_of(url: str) -> str | None:
    """``sqlite`` or ``postgresql``; None: neither."""
    scheme, separator, _ = url.partition("://")
    return SCHEMES.get(scheme.partition("+")[0]) if separator else None


def _check_installed(kind: str) -> None:
    missing = [name for name in NEEDED[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{NAME} needs the package {missing[0]}: pip install 'trimaran[records]' "
            "(an image: --build-arg EXTRAS=engine,records)",
            param=NAME,
        )


def _checked_file(rest: str) -> str:
    if not rest.startswith("/") or not (path := rest[1:]) or "?" in rest:
        raise ConfigError(f"{NAME}: a file is written sqlite:///usage.db, or sqlite:////data/usage.db", param=NAME)
    folder = Path(path).parent
    if not folder.is_dir():
        raise ConfigError(f"{NAME}: there is no folder {folder}; make it, or name another", param=NAME)
    return rest


def _postgresql(rest: str, ssl_name: str) -> str:
    try:
        parts = urlsplit("postgresql://" + rest)
        _ = parts.port
    except ValueError:
        raise ConfigError(f"{NAME} is no address of a database: {FORMS}", param=NAME) from None
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in ("sslmode", "ssl"):
        if name in query:
            query[ssl_name] = query.pop(name)
    if unknown := sorted(set(query) - {ssl_name, "host", "port"}):
        raise ConfigError(f"{NAME}: the parameter {unknown[0]} is not supported; leave it out", param=NAME)
    if not parts.path.strip("/"):
        raise ConfigError(f"{NAME} names no database: {FORMS}", param=NAME)
    return parts.netloc + parts.path + ("?" + urlencode(query) if query else "")
