"""Server-sent events: frames, comments while nothing comes, and the end of a request whose reader is gone."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, ClassVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.api.errors import error_json
from serve.api.generation import Choices, IndexedEvent
from serve.errors import GenerationFailed, ServeError
from serve.types import TokenEvent

logger = logging.getLogger(__name__)

TEXT = "\x00text"
"""Stands for a text while the frame around it is made once; no JSON string of ours holds a NUL otherwise."""

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
EVENT_STREAM: dict[str, Any] = {"text/event-stream": {}}
"""What OpenAPI says of a stream: no schema, since readers disagree on whether one is of the body or of an event."""

HEADERS = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}


def frame(data: bytes) -> bytes:
    """One event; ``data`` is JSON, which has no line breaks."""
    return b"data: " + data + b"\n\n"


def named_frame(name: str, data: bytes) -> bytes:
    """One event of a wire whose events have names."""
    return b"event: " + name.encode() + b"\n" + frame(data)


class Shape(ABC):
    """Turns a request's events into the frames of one wire.  What is not overridden is OpenAI's."""

    keep_alive: ClassVar[bytes] = KEEP_ALIVE
    """Sent while the first token does not come."""

    def opening(self) -> bytes:
        """What is sent before the first token."""
        return b""

    @abstractmethod
    def frames(self, index: int, event: TokenEvent) -> Iterable[bytes]:
        """The frames of one event of a choice; the last choice's last event also closes the wire's stream."""

    def failed(self, error: ServeError) -> bytes:
        """The end of a stream that failed after its headers were sent."""
        return frame(error_json(error)) + DONE


class WritePace:
    """Spreads a bounded number of writes over all open streams: the more there are, the more tokens share one.

    Where each write is a message through a platform's relay, it costs more than the token in it.

    Args:
        writes_per_s: To all streams together; None is no bound.
    """

    def __init__(self, writes_per_s: int | None = None) -> None:
        self._writes_per_s = writes_per_s
        self.is_bounded = writes_per_s is not None
        self.num_streams = 0

    async def rest(self) -> None:
        """Wait after a write, so that the next one carries more."""
        if self._writes_per_s is not None:
            await asyncio.sleep(self.num_streams / self._writes_per_s)


async def event_frames(choices: Choices, shape: Shape, keep_alive_s: float, pace: WritePace) -> AsyncIterator[bytes]:
    """All frames of a request; what arrived together goes out in one write.

    An error after the headers becomes an event, since the status is already sent; it ends the stream.
    """
    pace.num_streams += 1
    try:
        if opening := shape.opening():
            yield opening
        while True:
            try:
                events = await asyncio.wait_for(choices.next(), keep_alive_s)
                break
            except TimeoutError:
                yield shape.keep_alive
        while events:
            pieces, error = _until_error(events, shape)
            yield b"".join(pieces)
            if error is not None:
                yield shape.failed(error)
                return
            if pace.is_bounded:
                await pace.rest()
            events = await choices.next()
    except Exception:
        logger.exception("Unexpected error in a stream")
        yield shape.failed(GenerationFailed("internal error while streaming"))
    finally:
        pace.num_streams -= 1


def _until_error(events: Iterable[IndexedEvent], shape: Shape) -> tuple[list[bytes], ServeError | None]:
    pieces: list[bytes] = []
    for index, event in events:
        if event.error is not None:
            return pieces, event.error
        pieces += shape.frames(index, event)
    return pieces, None


class EventStream(StreamingResponse):
    """Sends frames; whatever ends it, ``on_end`` is called, so that the engine never works for nobody."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], headers: dict[str, str], on_end: Callable[[], None]) -> None:
        super().__init__(frames, headers={**HEADERS, **headers})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end or until the client is gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
