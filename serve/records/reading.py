"""Sums of the usage records, read while the server or the command has something else to do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from serve.errors import RecordsUnavailable
from serve.records.address import database_address

COUNTS = ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")
MAX_DAYS = 3660

Sums = dict[str, Any]
"""One group's: the values that name it, and its sums."""


def first_day(days: int) -> date:
    """The first of so many days (UTC), today being the last."""
    return datetime.now(UTC).date() - timedelta(days=days - 1)


def read_sums(url: str, since: date, groups: Sequence[tuple[str, ...]]) -> list[list[Sums]]:
    """The sums since a day for each of the groupings.  Blocks; not in a thread that runs an event loop.

    Raises:
        ConfigError: the address is wrong, or a package is missing.
        RecordsUnavailable: the database does not answer or holds no records; the message says why.
    """
    address = database_address(url)
    if address.startswith("sqlite") and not Path(file := address.partition(":///")[2]).exists():
        raise RecordsUnavailable(f"there is no file {file}: has a server with this SERVE_RECORDS_URL run yet?")
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    try:
        return asyncio.run(_read(url, since, groups))
    except (SQLAlchemyError, OSError) as error:
        reason = (str(getattr(error, "orig", None) or error) or type(error).__name__).splitlines()[0]
        raise RecordsUnavailable(f"the database of usage records cannot be read: {reason}") from None


async def _read(url: str, since: date, groups: Sequence[tuple[str, ...]]) -> list[list[Sums]]:
    from serve.records.store import UsageStore  # noqa: PLC0415

    store = UsageStore(url)
    try:
        found = [await store.sums(since, columns) for columns in groups]
    finally:
        await store.close()
    return [[_plain(row) for row in rows] for rows in found]


def _plain(sums: Mapping[str, Any]) -> Sums:
    """PostgreSQL's sums are decimal numbers."""
    return {**sums, **{name: int(sums[name]) for name in COUNTS}}
