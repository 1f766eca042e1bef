"""Shared limits in PostgreSQL: one row for each caller, one statement for each exchange.

Straight through asyncpg, on the server's event loop: the statements are prepared, and nothing of them is worth
SQLAlchemy's work on a request's path.  The server's clock counts, ``now()``; no row stays locked between statements.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from typing import Any

import asyncpg  # pyright: ignore[reportMissingTypeStubs]

from serve.limits import Allowance
from serve.records.address import asyncpg_address
from serve.records.row import MAX_TEXT
from serve.sharing.store import LEASE_S, Answer, Ask

_driver: Any = asyncpg  # it has no types

# $1 replica, $2 lease in seconds, $3 to $7 the allowance (NULL: no limit), $8 to $16 what is asked, caller by caller.
# A caller of whom nothing is known only gets its row (granted is NULL), and is asked for again: one rule, in one place.
# Rows are locked in the order of callers, so that no two replicas wait for each other.
# No commit waits for the disk: a PostgreSQL that crashes forgets less than a second of counts, and nothing else.
# That is part of the statement, so that it holds behind a pooler of connections too.
EXCHANGE = """
WITH unflushed AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)), asked AS MATERIALIZED (
  SELECT * FROM unnest($8::text[], $9::int[], $10::int[], $11::int[], $12::bigint[], $13::bigint[], $14::float8[],
                       $15::bigint[], $16::float8[])
    AS a(caller, wanted, num_running, requests, tokens, day_tokens, day_usd, known_tokens, known_usd)
)
INSERT INTO limit_caller AS c (caller, at, requests, tokens, day, day_tokens, day_usd, running)
SELECT caller, now(), $3::float8, $4::float8, (now() AT TIME ZONE 'UTC')::date, known_tokens, known_usd, '{}'
FROM asked, unflushed ORDER BY caller COLLATE "C"
ON CONFLICT (caller) DO UPDATE SET (at, requests, tokens, day, day_tokens, day_usd, running, granted) = (
  SELECT greatest(c.at, now()), stands.requests - grants.num, stands.tokens, today, stands.day_tokens, stands.day_usd,
    CASE WHEN $7::int IS NULL THEN '{}' WHEN a.num_running + grants.num = 0 THEN elsewhere.leases
      ELSE elsewhere.leases
        || jsonb_build_object($1::text, jsonb_build_array(a.num_running + grants.num, epoch + $2::float8)) END,
    grants.num
  FROM asked AS a,
    LATERAL (SELECT (now() AT TIME ZONE 'UTC')::date AS today, extract(epoch FROM now())::float8 AS epoch,
      greatest(0, extract(epoch FROM now() - c.at)::float8) / 60 AS minutes) AS clock,
    LATERAL (SELECT coalesce(jsonb_object_agg(key, value), '{}') AS leases,
      coalesce(sum((value->>0)::int), 0)::int AS num_running
      FROM jsonb_each(c.running) WHERE key <> $1 AND (value->>1)::float8 > epoch) AS elsewhere,
    LATERAL (SELECT least($3, coalesce(c.requests, $3) + minutes * $3) - a.requests AS requests,
      least($4, coalesce(c.tokens, $4) + minutes * $4) - a.tokens AS tokens,
      CASE WHEN c.day = today THEN c.day_tokens ELSE 0 END + a.day_tokens AS day_tokens,
      CASE WHEN c.day = today THEN c.day_usd ELSE 0 END + a.day_usd AS day_usd) AS stands,
    LATERAL (SELECT greatest(0, least(a.wanted, floor(stands.requests),
      CASE WHEN stands.tokens < 1 OR stands.day_tokens >= $5::bigint OR stands.day_usd >= $6::float8 THEN 0 END,
      $7 - elsewhere.num_running - a.num_running))::int AS num) AS grants
  WHERE a.caller = c.caller
)
RETURNING caller, granted, requests, tokens, day_tokens, day_usd,
  (SELECT coalesce(sum((value->>0)::int), 0)::int FROM jsonb_each(running) WHERE key <> $1) AS num_elsewhere
"""

BEAT = """
WITH unflushed AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)),
gone AS (DELETE FROM limit_replica WHERE until < now() - interval '1 hour'),
mine AS (
  INSERT INTO limit_replica SELECT $1::text, now() + $2::float8 * interval '1 second' FROM unflushed
  ON CONFLICT (replica) DO UPDATE SET until = excluded.until
)
SELECT 1 + count(*)::int FROM limit_replica WHERE replica <> $1 AND until > now()
"""

# Nothing is left to count of a caller who was not here for so long.
FORGET = """
DELETE FROM limit_caller WHERE caller IN (
  SELECT caller FROM limit_caller WHERE at < now() - interval '2 days' FOR UPDATE SKIP LOCKED
)
"""


class LimitTable:
    """One replica's connection.

    Args:
        url: As ``SERVE_RECORDS_URL``.
        allowance: Of each caller.

    Raises:
        ConfigError: see :func:`serve.records.address.database_address`.
    """

    def __init__(self, url: str, allowance: Allowance) -> None:
        self._address = asyncpg_address(url)
        self._limits = (
            allowance.requests_per_minute,
            allowance.tokens_per_minute,
            allowance.tokens_per_day,
            allowance.usd_per_day,
            allowance.concurrency,
        )
        self._replica = uuid.uuid4().hex
        self._connection: Any = None
        self._exchange: Any = None
        self._beat: Any = None

    async def open(self) -> None:
        """Connect, prepare the statements, and forget who has not been here for long."""
        if self._connection is None or self._connection.is_closed():
            connection = await _driver.connect(self._address)
            self._connection = connection
            self._exchange = await connection.prepare(EXCHANGE)
            self._beat = await connection.prepare(BEAT)
            await connection.execute(FORGET)

    async def beat(self) -> int:
        """Say that this replica lives; returns how many do."""
        return await self._beat.fetchval(self._replica, LEASE_S)

    async def exchange(self, asks: Sequence[Ask]) -> list[Answer]:
        """Count and grant, for all of these callers at once."""
        named = {stored_name(ask.caller): ask for ask in asks}
        found = await self._rows(named)
        if newcomers := {row["caller"]: named[row["caller"]] for row in found if row["granted"] is None}:
            found = [row for row in found if row["granted"] is not None] + await self._rows(newcomers)
        return [_answer(named[row["caller"]].caller, row) for row in found]

    async def _rows(self, named: dict[str, Ask]) -> list[Any]:
        asks = named.values()
        return await self._exchange.fetch(
            self._replica,
            LEASE_S,
            *self._limits,
            list(named),
            [ask.num_wanted for ask in asks],
            [ask.num_running for ask in asks],
            [ask.requests for ask in asks],
            [ask.tokens for ask in asks],
            [ask.tokens_today for ask in asks],
            [ask.usd_today for ask in asks],
            [ask.known_tokens for ask in asks],
            [ask.known_usd for ask in asks],
        )

    async def leave(self) -> None:
        """This replica ends; close."""
        await self._connection.execute("DELETE FROM limit_replica WHERE replica = $1", self._replica)
        connection, self._connection = self._connection, None
        await connection.close()

    def drop(self) -> None:
        """Give up the connection, at once."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


def stored_name(caller: str) -> str:
    """As PostgreSQL takes it: an issuer's callers may have NUL, lone surrogates or a page of text in their names."""
    if caller.isprintable() and len(caller) <= MAX_TEXT:
        return caller
    return "sha256:" + hashlib.sha256(caller.encode(errors="surrogatepass")).hexdigest()


def _answer(caller: str, row: Any) -> Answer:
    return Answer(
        caller=caller,
        num_granted=row["granted"],
        requests=row["requests"],
        tokens=row["tokens"],
        tokens_today=row["day_tokens"],
        usd_today=row["day_usd"],
        num_elsewhere=row["num_elsewhere"],
    )
