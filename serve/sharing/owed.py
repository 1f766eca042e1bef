"""What one replica has done and not told yet, and what it gives by itself while there is nobody to tell."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from serve.errors import RateLimited
from serve.limits import Bucket, Limiter, Standing

Verdict = asyncio.Future[RateLimited | bool]
"""Refused, let in (True), or nobody knows (False)."""


@dataclass(slots=True)
class Owed:
    """What the database has not been told of a caller, and who waits for its answer.

    ``requests`` were let in uncounted; below zero: counted, but never let in.
    """

    day: int = 0
    requests: int = 0
    tokens: int = 0
    tokens_today: int = 0
    usd_today: float = 0.0
    waiting: list[Verdict] = field(default_factory=list[Verdict])

    def turn(self, day: int) -> None:
        """Today is ``day``: what was used on another matters no longer."""
        if self.day != day:
            self.day, self.tokens_today, self.usd_today = day, 0, 0.0

    def add(self, other: Owed) -> None:
        """It was not told after all."""
        self.requests += other.requests
        self.tokens += other.tokens
        if self.day == other.day:
            self.tokens_today += other.tokens_today
            self.usd_today += other.usd_today

    def forsake(self) -> None:
        """Nobody will answer those who wait."""
        for verdict in self.waiting:
            if not verdict.done():
                verdict.set_result(False)
        self.waiting.clear()


class Part(Limiter):
    """This replica's even part of what was left to each caller, and of what flows back."""

    def __init__(self, whole: Limiter, num_replicas: int, clock: Callable[[], float]) -> None:
        super().__init__(whole.allowance.part(num_replicas), clock)
        self._whole = whole
        self._num_replicas = num_replicas

    def _newcomer(self, name: str, now: float) -> Standing:
        whole, own = self._whole.standing(name), super()._newcomer(name, now)
        return Standing(
            self._part_of(whole.requests, own.requests, now),
            self._part_of(whole.tokens, own.tokens, now),
            num_running=whole.num_running,
            day=whole.day,
            tokens_today=math.ceil(whole.tokens_today / self._num_replicas),
            usd_today=whole.usd_today / self._num_replicas,
        )

    def _part_of(self, whole: Bucket | None, own: Bucket | None, now: float) -> Bucket | None:
        if whole is None or own is None:
            return None
        return Bucket(own.capacity, now, whole.level(now) / self._num_replicas)
