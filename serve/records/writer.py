"""Usage records on their way to the database: a bounded buffer, and a thread that empties it.

The thread has an event loop of its own, so that neither SQLAlchemy's work nor a database that hangs is ever in the way
of a token.  The server's event loop only appends.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime
from functools import partial
from typing import TYPE_CHECKING

from serve.observe import RequestRecord
from serve.records.address import database_address
from serve.records.row import UsageRow, usage_row

if TYPE_CHECKING:
    from serve.records.store import UsageStore

logger = logging.getLogger(__name__)

TellSpent = Callable[[int, Mapping[str, tuple[int, float]]], object]
EPOCH = date(1970, 1, 1)

BATCH = 500
INTERVAL_S = 0.5
"""How long a record waits at most while the database answers."""

FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 5.0
"""Between two attempts while it does not."""

RETRY_AT_END_S = 0.05
FLUSH_S = 2.0
"""For what is left when the server ends."""


class RecordWriter:
    """Takes records on the server's event loop, writes them from its own thread.

    Args:
        url: As ``SERVE_RECORDS_URL``.
        max_waiting: Records that may wait; more are dropped, and counted.

    Raises:
        ConfigError: the address is wrong or a package is missing.
    """

    def __init__(self, url: str, max_waiting: int) -> None:
        database_address(url)
        self._url = url
        self._max_waiting = max_waiting
        self._rows: deque[UsageRow] = deque()
        self._batch: list[UsageRow] = []
        self._ending = threading.Event()
        self._wake: Callable[[], object] = bool
        self._tell_spent: TellSpent | None = None
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self.num_written = 0
        self.num_dropped = 0

    @property
    def num_waiting(self) -> int:
        """Records that are not written yet."""
        return len(self._rows) + len(self._batch)

    def start(self, tell_spent: TellSpent | None = None) -> None:
        """Begin writing.

        Args:
            tell_spent: Called once, in the writer's thread, with what today's records hold before this process adds
                to them: the day since the epoch, and each caller's tokens and dollars.
        """
        self._tell_spent = tell_spent
        self._thread.start()

    def put(self, record: RequestRecord) -> None:
        """Take the record of a request that has ended; costs it microseconds."""
        row = usage_row(record)
        if row is None:
            return
        if self._ending.is_set() or self.num_waiting >= self._max_waiting:
            self.num_dropped += 1
        else:
            self._rows.append(row)

    async def close(self, timeout_s: float = FLUSH_S) -> None:
        """Write what is left, for so many seconds at most."""
        self._deadline = time.monotonic() + timeout_s
        self._ending.set()
        with suppress(RuntimeError):  # its loop has ended
            self._wake()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout_s + 0.5)
        if lost := self.num_waiting + self.num_dropped:
            logger.error("%d usage records were not written", lost)

    # In the thread.

    def _run(self) -> None:
        try:
            asyncio.run(self._write_all())
        except Exception:
            logger.exception("Usage records are no longer written")
            self._ending.set()

    async def _write_all(self) -> None:
        from serve.records.store import UsageStore  # noqa: PLC0415

        store, woken = UsageStore(self._url), asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, woken.set)
        if self._ending.is_set():
            woken.set()
        is_migrated, pause_s = False, 0.0
        while True:
            try:
                if not is_migrated:
                    await store.migrate()
                    is_migrated = True
                await self._recall(store)
                await self._write_waiting(store)
            except Exception as error:
                is_migrated = False  # it may come back empty: another file, another server
                pause_s = min(pause_s * 2 or FIRST_PAUSE_S, MAX_PAUSE_S)
                if pause_s == FIRST_PAUSE_S:  # once for each time that it goes away
                    logger.warning("The database of usage records does not answer: %s", _reason(error))
                await _close(store)
            else:
                if pause_s:
                    logger.info("The database of usage records answers again")
                pause_s = 0.0
            if self._ending.is_set() and not self.num_waiting:
                break
            await self._rest(pause_s or INTERVAL_S, woken)  # a driver's thread may need it to end
            if time.monotonic() > self._deadline:
                break
        await _close(store)

    async def _recall(self, store: UsageStore) -> None:
        """Before the first record is written, so that none counts twice."""
        if self._tell_spent is not None:
            today = datetime.now(UTC).date()
            spent = await store.spent(today)
            tell, self._tell_spent = self._tell_spent, None
            tell((today - EPOCH).days, spent)

    async def _write_waiting(self, store: UsageStore) -> None:
        """Write all that waits.  A batch that failed is the next one again, unchanged."""
        while True:
            while self._rows and len(self._batch) < BATCH:
                self._batch.append(self._rows.popleft())
            if not self._batch:
                return
            await store.write(self._batch)
            self.num_written += len(self._batch)
            self._batch = []

    async def _rest(self, seconds: float, woken: asyncio.Event) -> None:
        """Sleep, until the server ends at most; then only so long that a database which is away is not besieged."""
        with suppress(TimeoutError):
            await asyncio.wait_for(woken.wait(), seconds)
        if self._ending.is_set():
            await asyncio.sleep(RETRY_AT_END_S)


def _reason(error: Exception) -> str:
    """One line; drivers name host, user and database, never the password."""
    text = str(getattr(error, "orig", None) or error) or type(error).__name__
    return text.splitlines()[0][:200]


async def _close(store: UsageStore) -> None:
    try:
        await store.close()
    except Exception as error:
        logger.debug("A connection to the database of usage records could not be closed: %s", _reason(error))
