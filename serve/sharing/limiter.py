"""A limiter whose numbers are those of all replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import islice

from serve.errors import RateLimited
from serve.limits import BUSY_RETRY_S, DAY_S, Allowance, Bucket, Limiter, Remaining, Spent
from serve.sharing.link import STEADY_WAIT_S, WAIT_S, Link
from serve.sharing.owed import Owed, Part, Verdict
from serve.sharing.store import Answer, Ask, LimitStore

BATCH = 100
"""Callers in one exchange."""

REFUSED_S = 0.2
"""So long a refusal holds without asking again: who floods this replica does not flood the database."""


class SharedLimiter(Limiter):
    """Asks the database before a request begins; its own numbers are what the database told last.

    Args:
        allowance: Of each caller, in all replicas together.
        open_store: Makes the database's side; called in a thread.
        clock: Seconds since the epoch.
    """

    def __init__(
        self, allowance: Allowance, open_store: Callable[[], LimitStore], clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(allowance, clock)
        self._owed: dict[str, Owed] = {}
        self._alone: Limiter | None = Part(self, 1, clock)
        self.link = Link(self, open_store)
        self._refused_until: dict[str, float] = {}
        self.num_alone = 0
        """Requests that were decided without the database."""

    @property
    def needs_recall(self) -> bool:
        """Yes: it says that the tables are there, too."""
        return True

    def expect_recall(self) -> None:
        """Requests wait for the first exchange, or for its failure."""
        self._recalled = self.link.tried

    def recall(self, day: int, spent: Spent) -> None:
        """The database has its tables; what callers used today is for those of whom the limits' table knows nothing."""
        self._recalled, tried = None, self._recalled
        super().recall(day, spent)
        self._recalled = tried
        self.link.ready()

    async def enter(self, name: str) -> None:
        """Let a request begin, if all replicas together have not used up the allowance.

        Raises:
            RateLimited: as for one process.
        """
        if self._recalled is not None:
            await self._recalled.wait()
        while self._alone is None:
            verdict = self._refused_lately(name) or await self._ask(name)
            if isinstance(verdict, RateLimited):
                raise verdict
            if verdict:
                return
        self._enter_alone(name, self._alone)

    def release(self, name: str, num_tokens: int, usd: float = 0.0) -> None:
        """A request has ended; the other replicas know with the next exchange."""
        if self._alone is not None:
            self._alone.release(name, num_tokens, usd)
        super().release(name, num_tokens, usd)
        if self.allowance.counts_work or self.allowance.concurrency is not None:
            owed = self._owe(name)
            owed.tokens += num_tokens
            owed.tokens_today += num_tokens
            owed.usd_today += usd

    def remaining(self, name: str) -> list[Remaining]:
        """What all replicas together have left; without the database, what this one has."""
        return super().remaining(name) if self._alone is None else self._alone.remaining(name)

    def _owe(self, name: str) -> Owed:
        """What goes with the next exchange, which is wanted now."""
        self.link.wake()
        owed = self._owed.setdefault(name, Owed())
        owed.turn(int(self._clock() // DAY_S))
        return owed

    def _refused_lately(self, name: str) -> RateLimited | None:
        """Why this caller may not begin, where the database has just said so."""
        if self._refused_until.get(name, 0.0) <= self._clock():
            return None
        return self.refusal(name)

    async def _ask(self, name: str) -> RateLimited | bool:
        """The database's verdict; False: there is none."""
        loop = asyncio.get_running_loop()
        verdict: Verdict = loop.create_future()
        self._owe(name).waiting.append(verdict)
        try:
            for _ in range(2):
                due = loop.time() + WAIT_S
                await asyncio.wait({verdict}, timeout=WAIT_S)
                if verdict.done() or loop.time() - due < STEADY_WAIT_S:
                    break  # else the event loop was held up, which says nothing of the database
        except asyncio.CancelledError:
            if not verdict.cancel() and verdict.result() is True:
                self.release(name, 0)
            raise
        if verdict.done():
            return verdict.result()
        verdict.cancel()
        self.link.lose(f"no answer within {WAIT_S * 1000:g} ms")
        return False

    def _enter_alone(self, name: str, part: Limiter) -> None:
        self.num_alone += 1
        part.admit(name)
        caller = self.standing(name)
        caller.num_running += 1
        if caller.requests is not None:
            caller.requests.take(1, self._clock())
        self._owe(name).requests += 1

    # What the link asks for.

    @property
    def has_news(self) -> bool:
        """Whether there is anything to tell or to ask."""
        return bool(self._owed)

    def turned(self, *, is_up: bool) -> None:
        """Take the database's word, or this replica's part of what it said last."""
        self._alone = None if is_up else Part(self, self.link.num_replicas, self._clock)
        if not is_up:
            for owed in self._owed.values():
                owed.forsake()

    def renew(self) -> None:
        """Tell of each caller with running requests again."""
        if self.allowance.concurrency is not None:
            for name, caller in self._callers.items():
                if caller.num_running:
                    self._owe(name)

    async def exchange(self, store: LimitStore) -> None:
        """Tell what is owed of some callers, and let in whom the database lets in."""
        if len(self._refused_until) > BATCH:
            now = self._clock()
            self._refused_until = {name: until for name, until in self._refused_until.items() if until > now}
        batch = {name: self._owed.pop(name) for name in list(islice(self._owed, BATCH))}
        if not batch:
            return
        try:
            answers = await store.exchange([self._ask_of(name, owed) for name, owed in batch.items()])
        except BaseException:  # nobody knows whether it was counted: then twice rather than not at all
            for name, owed in batch.items():
                owed.forsake()
                self._owe(name).add(owed)
            raise
        for answer in answers:
            self._take(answer, batch[answer.caller])

    def _ask_of(self, name: str, owed: Owed) -> Ask:
        caller = self.standing(name)
        owed.turn(caller.day)
        return Ask(
            caller=name,
            num_wanted=sum(not verdict.done() for verdict in owed.waiting),
            num_running=caller.num_running,
            requests=owed.requests,
            tokens=owed.tokens,
            tokens_today=owed.tokens_today,
            usd_today=owed.usd_today,
            known_tokens=caller.tokens_today - owed.tokens_today,
            known_usd=caller.usd_today - owed.usd_today,
        )

    def _take(self, answer: Answer, told: Owed) -> None:
        """Stand where the database says, but for what it has not been told yet; then let in, or refuse."""
        caller, since, now = self.standing(answer.caller), self._owed.get(answer.caller, Owed()), self._clock()
        if caller.requests is not None and answer.requests is not None:
            caller.requests = Bucket(caller.requests.capacity, now, answer.requests - since.requests)
        if caller.tokens is not None and answer.tokens is not None:
            caller.tokens = Bucket(caller.tokens.capacity, now, answer.tokens - since.tokens)
        caller.tokens_today = answer.tokens_today + since.tokens_today
        caller.usd_today = answer.usd_today + since.usd_today
        caller.num_elsewhere = answer.num_elsewhere
        if self._alone is not None:  # too late: who waited is let in, or refused, without this answer
            told.forsake()
        num_left = answer.num_granted
        for verdict in told.waiting:
            if verdict.done():
                continue
            if num_left:
                num_left -= 1
                caller.num_running += 1
                verdict.set_result(True)
            else:
                verdict.set_result(self.refusal(answer.caller) or _refused_before())
                self._refused_until[answer.caller] = now + REFUSED_S
        if num_left:
            self._owe(answer.caller).requests -= num_left


def _refused_before() -> RateLimited:
    """It flowed back between the database's answer and now."""
    return RateLimited("your allowance is used up; try again in 1 s", retry_after=BUSY_RETRY_S)
