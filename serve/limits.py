"""What each caller may use: requests and tokens per minute, tokens and dollars per day, requests at once.

In this process only: with N replicas a caller gets up to N times as much, unless they share (``serve.sharing``).
No HTTP here; the clock is given.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve.errors import RateLimited

MAX_CALLERS = 10_000
"""Beyond so many, callers who have their whole allowance again are forgotten."""

BUSY_RETRY_S = 1.0
DAY_S = 86_400

RECALL_WAIT_S = 5.0
"""So long after the start a request waits for what its caller has used today already; loading a model takes longer."""

Spent = Mapping[str, tuple[int, float]]
"""Tokens and dollars of each caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """For each caller; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    usd_per_day: float | None = None
    concurrency: int | None = None

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing is counted at all."""
        return self == Allowance()

    @property
    def counts_work(self) -> bool:
        """Whether a request's tokens or costs must be known when it ends."""
        return self.tokens_per_minute is not None or self.counts_days

    @property
    def counts_days(self) -> bool:
        """Whether what was used before this process began matters."""
        return self.tokens_per_day is not None or self.usd_per_day is not None

    def part(self, num_replicas: int) -> Allowance:
        """What each of so many replicas gives by itself; counts are rounded up, so that nobody is shut out."""

        def ceil(limit: int | None) -> int | None:
            return None if limit is None else math.ceil(limit / num_replicas)

        return Allowance(
            requests_per_minute=ceil(self.requests_per_minute),
            tokens_per_minute=ceil(self.tokens_per_minute),
            tokens_per_day=ceil(self.tokens_per_day),
            usd_per_day=None if self.usd_per_day is None else self.usd_per_day / num_replicas,
            concurrency=ceil(self.concurrency),
        )


class Bucket:
    """``per_minute`` units that flow back evenly.  May go below zero: who took too much waits longer."""

    def __init__(self, per_minute: int, now: float, level: float | None = None) -> None:
        self.capacity = per_minute
        self._level = float(per_minute) if level is None else level
        self._updated_at = now

    def level(self, now: float) -> float:
        """Units that are there at ``now``."""
        passed_s = max(0.0, now - self._updated_at)  # a clock that was set back must not make a debt
        self._level = min(self.capacity, self._level + passed_s * self.capacity / 60)
        self._updated_at = now
        return self._level

    def take(self, units: int, now: float) -> None:
        """Take units, there or not."""
        self._level = self.level(now) - units

    def wait_s(self, units: int, now: float) -> float:
        """Seconds until so many units are there; 0.0 when they are."""
        return max(0.0, units - self.level(now)) * 60 / self.capacity


@dataclass(frozen=True, slots=True)
class Remaining:
    """One of the limits as a caller is told it: ``resets_in_s`` until the whole allowance is there again."""

    kind: str
    limit: float
    remaining: float
    resets_in_s: float


@dataclass(slots=True)
class Standing:
    """Where one caller stands.  ``num_elsewhere`` of its requests run in other replicas, as far as is known."""

    requests: Bucket | None
    tokens: Bucket | None
    num_running: int = 0
    num_elsewhere: int = 0
    day: int = 0
    tokens_today: int = 0
    usd_today: float = 0.0


class Limiter:
    """Counts what callers use.  Belongs to the event loop.

    A request's tokens and costs are known only when it has ended, and are taken then: a caller may go into debt with
    what runs at once, and waits it off.

    Args:
        allowance: Of each caller.
        clock: Seconds since the epoch.
    """

    def __init__(self, allowance: Allowance, clock: Callable[[], float] = time.time) -> None:
        self.allowance = allowance
        self._clock = clock
        self._callers: dict[str, Standing] = {}
        self._recalled: asyncio.Event | None = None

    def expect_recall(self) -> None:
        """Somebody will :meth:`recall`; requests wait for that, :data:`RECALL_WAIT_S` from now at most."""
        self._recalled = asyncio.Event()
        asyncio.get_running_loop().call_later(RECALL_WAIT_S, self._recalled.set)

    @property
    def needs_recall(self) -> bool:
        """Whether what was used before this process began matters."""
        return self.allowance.counts_days

    def recall(self, day: int, spent: Spent) -> None:
        """Add what callers used on a day (since the epoch) before this process began."""
        if day == int(self._clock() // DAY_S):
            for name, (num_tokens, usd) in spent.items():
                caller = self.standing(name)
                caller.tokens_today += num_tokens
                caller.usd_today += usd
        if self._recalled is not None:
            self._recalled.set()

    async def enter(self, name: str) -> None:
        """:meth:`admit`, as soon as what was used before is known.

        Raises:
            RateLimited: as there.
        """
        if self._recalled is not None:
            await self._recalled.wait()
        self.admit(name)

    def admit(self, name: str) -> None:
        """Let a request of this caller begin; :meth:`release` ends it.

        Raises:
            RateLimited: an allowance is used up; the error says which, and when to come back.
        """
        if (refusal := self.refusal(name)) is not None:
            raise refusal
        caller = self.standing(name)
        caller.num_running += 1
        if caller.requests is not None:
            caller.requests.take(1, self._clock())

    def refusal(self, name: str) -> RateLimited | None:
        """Why a request of this caller may not begin now; None: it may."""
        allowance, caller, now = self.allowance, self.standing(name), self._clock()
        num_running = caller.num_running + caller.num_elsewhere
        if allowance.concurrency is not None and num_running >= allowance.concurrency:
            return _refusal(f"{num_running} of your requests are running, as many as allowed", BUSY_RETRY_S)
        if caller.requests is not None and (wait_s := caller.requests.wait_s(1, now)):
            return _refusal(f"you may send {allowance.requests_per_minute} requests per minute", wait_s)
        if caller.tokens is not None and (wait_s := caller.tokens.wait_s(1, now)):
            return _refusal(f"you may use {allowance.tokens_per_minute} tokens per minute", wait_s)
        if allowance.tokens_per_day is not None and caller.tokens_today >= allowance.tokens_per_day:
            return _refusal(f"you may use {allowance.tokens_per_day} tokens per day (UTC)", DAY_S - now % DAY_S)
        if allowance.usd_per_day is not None and caller.usd_today >= allowance.usd_per_day:
            return _refusal(
                f"you may use ${allowance.usd_per_day:g} of machine time per day (UTC)", DAY_S - now % DAY_S
            )
        return None

    def release(self, name: str, num_tokens: int, usd: float = 0.0) -> None:
        """A request that was admitted has ended, and has used so many tokens of prompt and completion, and dollars."""
        caller = self.standing(name)
        caller.num_running -= 1
        caller.tokens_today += num_tokens
        caller.usd_today += usd
        if caller.tokens is not None:
            caller.tokens.take(num_tokens, self._clock())

    def remaining(self, name: str) -> list[Remaining]:
        """What this caller has left of the minute's and the day's allowances, where these are limited."""
        allowance, caller, now = self.allowance, self.standing(name), self._clock()
        minutes = [
            Remaining(kind, bucket.capacity, max(0, math.floor(bucket.level(now))), bucket.wait_s(bucket.capacity, now))
            for kind, bucket in (("requests", caller.requests), ("tokens", caller.tokens))
            if bucket is not None
        ]
        days = [
            Remaining(kind, limit, max(0, limit - used), DAY_S - now % DAY_S)
            for kind, limit, used in (
                ("tokens-day", allowance.tokens_per_day, caller.tokens_today),
                ("usd-day", allowance.usd_per_day, caller.usd_today),
            )
            if limit is not None
        ]
        return minutes + days

    def standing(self, name: str) -> Standing:
        """Where this caller stands today."""
        now = self._clock()
        caller = self._callers.get(name)
        if caller is None:
            if len(self._callers) >= MAX_CALLERS:
                self._forget(now)
            caller = self._callers[name] = self._newcomer(name, now)
        day = int(now // DAY_S)
        if caller.day != day:
            caller.day, caller.tokens_today, caller.usd_today = day, 0, 0.0
        return caller

    def _newcomer(self, name: str, now: float) -> Standing:
        """How a caller begins of whom nothing is known."""
        del name
        requests, tokens = self.allowance.requests_per_minute, self.allowance.tokens_per_minute
        return Standing(
            Bucket(requests, now) if requests is not None else None,
            Bucket(tokens, now) if tokens is not None else None,
        )

    def _forget(self, now: float) -> None:
        self._callers = {name: caller for name, caller in self._callers.items() if not _is_fresh(caller, now)}


def _refusal(why: str, retry_after: float) -> RateLimited:
    return RateLimited(f"{why}; try again in {math.ceil(retry_after)} s", retry_after=retry_after)


def _is_fresh(caller: Standing, now: float) -> bool:
    """Whether the caller is as one who never came."""
    buckets = (caller.requests, caller.tokens)
    is_full = all(bucket is None or bucket.level(now) >= bucket.capacity for bucket in buckets)
    has_used = caller.day == int(now // DAY_S) and (caller.tokens_today or caller.usd_today)
    return is_full and not caller.num_running and not has_used
