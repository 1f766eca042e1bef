"""Replicas that share limits through a database in memory, which can be away, broken or silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from serve.errors import RateLimited
from serve.limits import DAY_S, Allowance, Limiter
from serve.sharing.limiter import SharedLimiter
from serve.sharing.store import Answer, Ask


class Clock:
    def __init__(self, now: float = DAY_S * 10_000 + 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Database:
    """The rule of one process, for all replicas."""

    def __init__(self, allowance: Allowance, clock: Clock) -> None:
        self.allowance, self.clock = allowance, clock
        self.limiter = Limiter(allowance, clock)
        self.leases: dict[str, dict[str, int]] = {}
        self.replicas: set[str] = set()
        self.is_away, self.is_broken, self.num_exchanges = False, False, 0
        self.answers = asyncio.Event()
        self.answers.set()

    def answer(self, replica: str, ask: Ask) -> Answer:
        caller, leases = self.limiter.standing(ask.caller), self.leases.setdefault(ask.caller, {})
        for bucket, units in ((caller.requests, ask.requests), (caller.tokens, ask.tokens)):
            if bucket is not None:
                bucket.take(units, self.clock())
        caller.tokens_today += ask.tokens_today
        caller.usd_today += ask.usd_today
        caller.num_elsewhere = sum(num for other, num in leases.items() if other != replica)
        caller.num_running, num_granted = ask.num_running, 0
        while num_granted < ask.num_wanted and self.limiter.refusal(ask.caller) is None:
            self.limiter.admit(ask.caller)
            num_granted += 1
        leases[replica] = ask.num_running + num_granted
        return Answer(
            caller=ask.caller,
            num_granted=num_granted,
            requests=caller.requests and caller.requests.level(self.clock()),
            tokens=caller.tokens and caller.tokens.level(self.clock()),
            tokens_today=caller.tokens_today,
            usd_today=caller.usd_today,
            num_elsewhere=caller.num_elsewhere,
        )


class Store:
    def __init__(self, database: Database, replica: str) -> None:
        self._database, self._replica = database, replica

    async def open(self) -> None:
        if self._database.is_away:
            raise OSError("it is away")

    async def beat(self) -> int:
        self._database.replicas.add(self._replica)
        return len(self._database.replicas)

    async def exchange(self, asks: Sequence[Ask]) -> list[Answer]:
        if self._database.is_away or self._database.is_broken:
            raise OSError("the connection broke")
        self._database.num_exchanges += 1
        answers = [self._database.answer(self._replica, ask) for ask in asks]
        await self._database.answers.wait()
        return answers

    async def leave(self) -> None:
        self._database.replicas.discard(self._replica)

    def drop(self) -> None:
        pass


@asynccontextmanager
async def replicas(num: int, **limits: Any) -> AsyncIterator[tuple[Database, list[SharedLimiter], Clock]]:
    """So many limiters that share one database, which has answered each of them."""
    clock, allowance = Clock(), Allowance(**limits)
    database = Database(allowance, clock)
    limiters = [SharedLimiter(allowance, lambda at=at: Store(database, str(at)), clock) for at in range(num)]
    for limiter in limiters:
        limiter.expect_recall()
        limiter.link.start()
        limiter.recall(0, {})
        await up(limiter)
    for limiter in limiters:
        limiter.link.num_replicas = num  # else known with the next sign of life
    yield database, limiters, clock
    for limiter in limiters:
        await limiter.link.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - it is the state that matters, however it comes about
            await asyncio.sleep(0.002)


async def up(limiter: SharedLimiter, is_up: bool = True) -> None:
    await until(lambda: limiter.link.is_up is is_up)


async def told(limiter: SharedLimiter) -> None:
    await until(lambda: not limiter.has_news)
    await asyncio.sleep(0.002)


async def let_in(limiter: SharedLimiter, times: int, name: str = "a") -> int:
    verdicts = await asyncio.gather(*(limiter.enter(name) for _ in range(times)), return_exceptions=True)
    assert all(verdict is None or isinstance(verdict, RateLimited) for verdict in verdicts), verdicts
    return verdicts.count(None)
