"""The database: schema, idempotent writing, sums.  Needs SQLAlchemy; imported where it is used alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, case, func, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from serve.records.address import database_address
from serve.records.row import UsageRow
from serve.records.table import VERSION_TABLE, usage

TIMEOUT_S = 10.0
"""For one transaction, the connection to the database included."""

CLOSE_S = 2.0
CLIENT_CLOSED = 499
"""The status of a request whose client left: no failure of anybody."""

MIGRATION_LOCK = 0x7472696D
"""Names PostgreSQL's lock under which one of several replicas migrates."""

_has_failed = usage.c.error_code.is_not(None) | ((usage.c.status >= 400) & (usage.c.status != CLIENT_CLOSED))


class UsageStore:
    """One database of usage records.

    Args:
        url: As ``SERVE_RECORDS_URL``.

    Raises:
        ConfigError: see :func:`database_address`.
    """

    def __init__(self, url: str) -> None:
        self._address = database_address(url)
        self._engine: AsyncEngine | None = None
        kind, _, file = self._address.partition(":///")
        self._file = Path(file) if kind.startswith("sqlite") else None

    async def migrate(self) -> None:
        """Bring the schema to this version; several replicas may do so at once.

        Raises:
            TimeoutError, OSError, sqlalchemy.exc.SQLAlchemyError: the database is away, or refuses.
        """
        async with asyncio.timeout(TIMEOUT_S), self._connected().begin() as connection:
            if connection.dialect.name == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            await connection.run_sync(_upgrade)

    async def write(self, rows: Iterable[UsageRow]) -> None:
        """Write all of the rows or none.  Those that are there already stay as they are.

        Raises:
            TimeoutError, OSError, sqlalchemy.exc.SQLAlchemyError: nobody knows whether they were written; write again.
        """
        if self._file is not None and not self._file.exists():
            raise FileNotFoundError(f"{self._file} was taken away")  # SQLite would go on to write into what is gone
        values = [asdict(row) for row in rows]
        async with asyncio.timeout(TIMEOUT_S), self._connected().begin() as connection:
            insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
            await connection.execute(insert(usage).on_conflict_do_nothing(index_elements=["id"]), values)

    async def sums(self, since: date, columns: Sequence[str]) -> Sequence[Mapping[str, Any]]:
        """Requests, failures, tokens, machine time and cost since a day (UTC), for each value of ``columns``."""
        keys = [usage.c[name] for name in columns]
        query = (
            select(
                *keys,
                func.count().label("requests"),
                func.sum(case((_has_failed, 1), else_=0)).label("failed"),
                *(func.sum(usage.c[name]).label(name) for name in ("prompt_tokens", "cached_tokens")),
                func.sum(usage.c.completion_tokens).label("completion_tokens"),
                func.avg(usage.c.ttft_ms).label("ttft_ms"),
                func.sum(usage.c.machine_ms).label("machine_ms"),
                func.sum(usage.c.cost_usd).label("cost_usd"),
            )
            .where(usage.c.day >= since)
            .group_by(*keys)
            .order_by(*keys)
        )
        async with asyncio.timeout(TIMEOUT_S), self._connected().connect() as connection:
            return [dict(row) for row in (await connection.execute(query)).mappings()]

    async def spent(self, day: date) -> dict[str, tuple[int, float]]:
        """Tokens and dollars of each caller on a day (UTC)."""
        num_tokens = func.sum(usage.c.prompt_tokens + usage.c.completion_tokens)
        query = select(usage.c.caller, num_tokens, func.sum(usage.c.cost_usd)).where(usage.c.day == day)
        async with asyncio.timeout(TIMEOUT_S), self._connected().connect() as connection:
            found = (await connection.execute(query.group_by(usage.c.caller))).all()
        return {caller: (int(tokens), float(usd or 0)) for caller, tokens, usd in found}

    async def close(self) -> None:
        """Give up all connections, broken ones too; the next call opens new ones."""
        engine, self._engine = self._engine, None
        if engine is not None:
            async with asyncio.timeout(CLOSE_S):
                await engine.dispose()

    def _connected(self) -> AsyncEngine:
        if self._engine is None:
            self._engine = create_async_engine(self._address, pool_size=1, max_overflow=0, hide_parameters=True)
        return self._engine


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    known = {revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()}
    found = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
    if found is None or found in known:  # else a later version was here, and migrations only add
        command.upgrade(config, "head")
