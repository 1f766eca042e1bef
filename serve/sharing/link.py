"""One replica's line to the database of limits: when it is asked, and whether it answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from serve.background import in_background
from serve.limits import RECALL_WAIT_S
from serve.sharing.store import LEASE_S, LimitStore

logger = logging.getLogger(__name__)

WAIT_S = 0.1
"""So long a request waits for the database: many times what one in the same region takes, and less than a prefill."""

STEADY_WAIT_S = WAIT_S / 2
"""The database is back when it answers within this; a request may have to wait for the exchange before its own."""

ANSWER_S = 2.0
"""An exchange that takes longer is given up, and its connection with it."""

FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 5.0
"""Between two attempts while the database is away."""

CLOSE_S = 1.0


class Speaker(Protocol):
    """Who has something to say over the link."""

    @property
    def has_news(self) -> bool:
        """Whether an exchange is wanted now."""
        ...

    async def exchange(self, store: LimitStore) -> None:
        """Say some of it, and take what is answered.  Raises whatever the store does."""
        ...

    def renew(self) -> None:
        """Requests that run must be told again, or they stop counting elsewhere."""
        ...

    def turned(self, *, is_up: bool) -> None:
        """The database decides from now on, or no longer does."""
        ...


class Link:
    """Keeps one exchange on its way at most.  Whatever comes up meanwhile goes with the next.

    Args:
        speaker: Asked for what there is to say.
        open_store: Makes the database's side; called in a thread, since it imports a driver.
    """

    def __init__(self, speaker: Speaker, open_store: Callable[[], LimitStore]) -> None:
        self._speaker = speaker
        self._open_store = open_store
        self._wake = asyncio.Event()
        self._is_ready = asyncio.Event()
        self._is_closing = False
        self._is_told = False
        self._working: asyncio.Task[None] | None = None
        self._beat_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._up_since = 0.0
        self.is_up = False
        """Whether the database decides now."""
        self.num_replicas = 1
        """As far as is known."""
        self.tried = asyncio.Event()
        """Set when the database has answered for the first time, or has not."""

    def start(self) -> None:
        """Begin, as soon as the tables are :meth:`ready`."""
        self._working = asyncio.create_task(self._work())

    def ready(self) -> None:
        """The database has its tables."""
        self._is_ready.set()

    def wake(self) -> None:
        """There is something to say."""
        self._wake.set()

    def lose(self, reason: str) -> None:
        """The database does not answer, or not soon enough: this replica decides alone, until it does."""
        if self.is_up:
            self.is_up = False
            lasted_s = asyncio.get_running_loop().time() - self._up_since
            self._pause_s = FIRST_PAUSE_S if lasted_s > MAX_PAUSE_S else min(self._pause_s * 2, MAX_PAUSE_S)
            self._speaker.turned(is_up=False)
        if not self._is_told:
            self._is_told = True
            part = f"1/{self.num_replicas} of each limit" if self.num_replicas > 1 else "each limit in full"
            logger.warning("Limits are not shared: %s; until the database answers this replica gives %s", reason, part)

    async def close(self) -> None:
        """Say what there is to say, for :data:`CLOSE_S` at most, and that this replica ends."""
        self._is_closing = True
        self._wake.set()
        self._is_ready.set()
        if self._working is not None and not (await asyncio.wait({self._working}, timeout=CLOSE_S))[0]:
            self._working.cancel()
            await asyncio.wait({self._working}, timeout=CLOSE_S)

    async def _work(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_ready.wait(), RECALL_WAIT_S)
        if not self._is_ready.is_set():
            self.lose("the database has never answered yet")
            self.tried.set()
            await self._is_ready.wait()
        if self._is_closing:
            return
        store = await in_background(self._open_store)
        try:
            while not self._is_closing:
                await self._try(store)
                self.tried.set()
                await self._rest()
            await self._leave(store)
        finally:
            store.drop()

    async def _try(self, store: LimitStore) -> None:
        """One exchange, and what it says of the database."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_S):
                await store.open()
                began = loop.time()
                await self._beat(store)
                await self._speaker.exchange(store)
        except Exception as error:
            store.drop()
            self.lose(_reason(error))
            return
        if self.is_up:
            return
        if loop.time() - began > STEADY_WAIT_S:
            self.lose("its answers take too long")
            return
        self.is_up, self._is_told, self._up_since = True, False, loop.time()
        self._speaker.turned(is_up=True)
        logger.info("Limits are shared; replicas now: %d", self.num_replicas)

    async def _beat(self, store: LimitStore) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._beat_at:
            self.num_replicas = await store.beat()
            self._beat_at = now + LEASE_S / 3
            self._speaker.renew()

    async def _rest(self) -> None:
        """Until there is something to say, or it is time for a sign of life; while nobody answers, for a pause."""
        loop = asyncio.get_running_loop()
        if not self.is_up:
            await self._pause()
        elif not self._speaker.has_news:
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, self._beat_at - loop.time()))

    async def _pause(self) -> None:
        """What comes up does not shorten it, the end of the server does."""
        left_s, self._pause_s = self._pause_s, min(self._pause_s * 2, MAX_PAUSE_S)
        while left_s > 0 and not self._is_closing:
            await asyncio.sleep(min(left_s, FIRST_PAUSE_S))
            left_s -= FIRST_PAUSE_S

    async def _leave(self, store: LimitStore) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await store.open()
                while self._speaker.has_news:
                    await self._speaker.exchange(store)
                await store.leave()
        except Exception as error:
            logger.debug("The other replicas do not know yet that this one ends: %s", _reason(error))


def _reason(error: Exception) -> str:
    """One line; drivers name host, user and database, never the password."""
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_S:g} s"
    return (str(error) or type(error).__name__).splitlines()[0][:200]
