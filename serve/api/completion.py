"""The fold of a request's events: the whole answer, as the stream would have told it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.types import Receive

from serve.engine.base import TokenStream
from serve.observe import RequestRecord
from serve.types import FinishReason, TokenEvent, Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """One request's text, why it ended, and its tokens."""

    text: str
    finish_reason: FinishReason
    usage: Usage


def note(record: RequestRecord, events: Iterable[TokenEvent]) -> None:
    """Keep the request's record true to what happened."""
    for event in events:
        record.queue_s = record.queue_s if event.queue_s is None else event.queue_s
        if event.token_id is not None:
            record.saw_tokens(1)
        if event.finish_reason is not None:
            record.finish_reason = event.finish_reason.value
        if event.error is not None:
            record.error_code = event.error.code


class RecordedStream:
    """A :class:`TokenStream` that keeps the request's record while it is read."""

    def __init__(self, stream: TokenStream, record: RequestRecord) -> None:
        self.request_id = stream.request_id
        self._stream = stream
        self._record = record

    async def next(self) -> tuple[TokenEvent, ...]:
        """All events that have arrived; empty after the last."""
        events = await self._stream.next()
        note(self._record, events)
        return events

    def close(self) -> None:
        """Nobody reads any more."""
        if self._record.finish_reason is None:
            self._record.finish_reason = FinishReason.ABORT.value
        self._stream.close()


async def fold(stream: RecordedStream) -> Completion:
    """Read a request to its end.

    Raises:
        ServeError: the request failed.
    """
    text: list[str] = []
    while events := await stream.next():
        for event in events:
            text.append(event.text)
            if event.error is not None:
                raise event.error
            if event.finish_reason is not None and event.usage is not None:
                return Completion("".join(text), event.finish_reason, event.usage)
    raise RuntimeError("the stream ended without a finish reason")


async def fold_unless_gone(stream: RecordedStream, receive: Receive) -> Completion | None:
    """:func:`fold`, given up when the client closes the connection: then None, and the request is aborted."""
    folding = asyncio.create_task(fold(stream))
    leaving = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({folding, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await folding if folding.done() else None
    finally:
        folding.cancel()
        leaving.cancel()
        stream.close()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
