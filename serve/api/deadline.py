"""``SERVE_REQUEST_DEADLINE_S``: what a request may take in all, from its first byte on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from serve.errors import DeadlineExceeded, ServeError
from serve.observe import RequestRecord


def at_deadline(record: RequestRecord, fail: Callable[[ServeError], object]) -> asyncio.TimerHandle | None:
    """Call ``fail`` when the request's time is over; cancel the handle when the request ends.  None: it has no end.

    Raises:
        DeadlineExceeded: it is over already.
    """
    if record.deadline_s is None:
        return None
    error = _error(record.deadline_s)
    left_s = record.deadline_s - record.age_s
    if left_s <= 0:
        raise error
    return asyncio.get_running_loop().call_later(left_s, fail, error)


@asynccontextmanager
async def before_deadline(record: RequestRecord) -> AsyncGenerator[None]:
    """Give up what runs inside when the request's time is over.

    Raises:
        DeadlineExceeded: then.
    """
    if record.deadline_s is None:
        yield
        return
    try:
        async with asyncio.timeout(record.deadline_s - record.age_s):
            yield
    except TimeoutError:
        raise _error(record.deadline_s) from None


def _error(deadline_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the request did not end within {deadline_s:g} s, which is all that this server gives one; "
        "ask for fewer tokens, or try again when it is less busy"
    )
