"""How the gateway passes one request on and its answer back (``serve.api.remote`` has the routes).

A remote that is not up is asked again; streams pass chunk by chunk; whoever leaves is let go at the remote too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from fastapi import Request
from pydantic_core import from_json, to_json
from starlette.responses import Response
from starlette.types import Receive

from serve.api.deadline import at_deadline
from serve.api.errors import error_json, message_error_json, show, speaks_anthropic, status_of
from serve.api.generation import wait_for_disconnect
from serve.api.middleware import CLIENT_CLOSED
from serve.api.sse import DONE, KEEP_ALIVE, EventStream, frame, named_frame
from serve.errors import EngineNotReady, QueueFull, RouteNotOffered, ServeError, UpstreamFailed
from serve.observe import RequestRecord
from serve.passage import Passage, PassageEngine
from serve.settings import Settings
from serve.upstream import COLD, Answer, Upstream

logger = logging.getLogger(__name__)

FIRST_WAIT_S, MAX_WAIT_S = 0.5, 5.0
RETRY_AFTER_S = 10.0
SENT_HEADERS = ("anthropic-version", "anthropic-beta")
PASSED_HEADERS = ("content-type", "retry-after", "x-ignored-parameters")
NO_ROUTE = frozenset({404, 405, 501})
"""What a server answers that has no such route.  JSON is the model's server speaking, not a platform's page."""


Watch = Callable[[bytes], None]
"""Sees the body of an answer that is no error, piece by piece."""


async def forward(request: Request, path: str, body: bytes = b"", watch: Watch | None = None) -> Response:
    """Send one request on, with its query, and its answer back.

    A remote that is not up yet is asked again until ``SERVE_LOAD_WAIT_S`` have passed.  A stream's caller gets comments
    meanwhile; after the first of them an error can only be an event.
    """
    settings: Settings = request.app.state.settings
    record: RequestRecord = request.scope["trimaran.record"]
    request.app.state.lifecycle.check_admission()
    engine = request.app.state.lifecycle.engine
    assert isinstance(engine, PassageEngine)  # noqa: S101 - as create_engine made it
    passage = engine.open()
    is_handed_over = False
    try:
        passage.end_by(at_deadline(record, passage.fail))
        target = f"{path}?{request.url.query}" if request.url.query else path
        opening = passage.begin(_open(request, target, body, record, settings.patience_s, passage))
        patience_s = settings.keep_alive_s if record.is_stream else None
        is_here, answer = await _unless_gone(passage, opening, request.receive, patience_s)
        if not is_here:
            record.finish_reason = "abort"
            return Response(status_code=CLIENT_CLOSED)
        if answer is None or _is_stream(answer):
            is_handed_over = True
            frames = _frames(passage, opening, settings.keep_alive_s, record, watch)
            return EventStream(frames, {}, passage.close)
        return await _whole(passage, answer, request.receive, record, watch)
    finally:
        if not is_handed_over:
            passage.close()


async def _open(
    request: Request, target: str, body: bytes, record: RequestRecord, patience_s: float, passage: Passage
) -> Answer:
    """The remote's answer, asked for again while it is not up.

    Raises:
        EngineNotReady: it did not come up in time.
        UpstreamFailed: it broke off, or refuses the gateway's own key.
    """
    upstream: Upstream = request.app.state.upstream
    headers = {name: request.headers[name] for name in SENT_HEADERS if name in request.headers}
    headers["x-request-id"] = record.request_id
    wait_s = FIRST_WAIT_S
    while True:
        after_s = 0.0
        try:
            answer = await upstream.send(request.method, target, body, headers)
        except ConnectionError as error:
            why = str(error)
        else:
            passage.at_end(answer.close)
            if answer.status in {401, 403}:
                raise UpstreamFailed(
                    f"the remote answered {answer.status} to this gateway: the operator must set SERVE_REMOTE_API_KEY"
                )
            if answer.status not in COLD:
                return answer
            why, after_s = f"it answers {answer.status}", _seconds(answer.headers.get("retry-after"))
            await answer.close()
        left_s = patience_s - (time.perf_counter() - record.received_at)
        if left_s <= 0:
            logger.warning("The remote is not there: %s", why)
            raise EngineNotReady("the model behind this gateway is not up yet; try again", retry_after=RETRY_AFTER_S)
        await asyncio.sleep(min(max(wait_s, min(after_s, MAX_WAIT_S)), left_s))
        wait_s = min(wait_s * 2, MAX_WAIT_S)


async def _whole(
    passage: Passage, answer: Answer, receive: Receive, record: RequestRecord, watch: Watch | None
) -> Response:
    is_here, body = await _unless_gone(passage, passage.begin(_read(answer)), receive, None)
    if not is_here:
        return Response(status_code=CLIENT_CLOSED)
    if answer.status >= 400:
        body = _told(answer, body, record)
    elif watch is not None:
        watch(body)
    headers = {name: answer.headers[name] for name in PASSED_HEADERS if name in answer.headers}
    return Response(body, answer.status, headers)


def _told(answer: Answer, body: bytes, record: RequestRecord) -> bytes:
    """The body of an error answer, as the clients of the request's path read it.

    Raises:
        QueueFull, RouteNotOffered, UpstreamFailed: it is no API's error, but a page of what stands in front of one.
    """
    try:
        given: Any = from_json(body)
    except ValueError:
        given = None
    error: Any = cast("dict[str, Any]", given).get("error") if isinstance(given, dict) else None
    message: Any = cast("dict[str, Any]", error).get("message") if isinstance(error, dict) else None
    if isinstance(message, str):
        if not speaks_anthropic(record.route):
            return body
        if "type" not in given:  # OpenAI's
            return message_error_json(answer.status, message, record.request_id)
        return to_json({**given, "request_id": record.request_id})  # a job is known by another id there
    if answer.status == 429:
        after_s = _seconds(answer.headers.get("retry-after")) or 1.0
        raise QueueFull("the remote takes no more requests now", retry_after=after_s)
    if isinstance(given, dict) and answer.status in NO_ROUTE:
        raise RouteNotOffered(f"the server behind this gateway has no {record.route} (it answered {answer.status})")
    raise UpstreamFailed(f"the remote answered {answer.status}: {show(body[:200].decode(errors='replace'))}")


async def _read(answer: Answer) -> bytes:
    return b"".join([chunk async for chunk in answer.chunks()])


async def _unless_gone(
    passage: Passage, step: asyncio.Task[Any], receive: Receive, timeout_s: float | None
) -> tuple[bool, Any]:
    """Whether the client still waits, and the step's result (None after ``timeout_s``)."""
    leaving = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({step, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and not step.done():
            return False, None
        return True, await passage.result(step, 0)
    finally:
        leaving.cancel()


async def _frames(
    passage: Passage,
    opening: asyncio.Task[Answer],
    keep_alive_s: float,
    record: RequestRecord,
    watch: Watch | None,
) -> AsyncIterator[bytes]:
    """The remote's bytes as they come, with comments between two events while nothing does."""
    try:
        while (answer := await passage.result(opening, keep_alive_s)) is None:
            yield KEEP_ALIVE
        if not _is_stream(answer):
            body = await passage.result(passage.begin(_read(answer))) or b""
            if answer.status >= 400:
                body = _told(answer, body, record)
            elif watch is not None:
                watch(body)
            yield _last(_one_line(body), record.route)
            return
        chunks, is_between = aiter(answer.chunks()), True
        while True:
            step = passage.begin(_next(chunks))
            while (chunk := await passage.result(step, keep_alive_s)) is None:
                if is_between:
                    yield KEEP_ALIVE
            if not chunk:
                return
            if watch is not None:
                watch(chunk)
            is_between = chunk.endswith((b"\n\n", b"\r\n\r\n"))
            yield chunk
    except ServeError as error:
        record.error_code = error.code
        if speaks_anthropic(record.route):
            data = message_error_json(status_of(error), error.message, record.request_id)
        else:
            data = error_json(error)
        yield _last(data, record.route)


def _last(error: bytes, path: str) -> bytes:
    """The end of a stream that failed, as the clients of its path read it."""
    return named_frame("error", error) if speaks_anthropic(path) else frame(error) + DONE


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    """The next chunk; empty after the last."""
    async for chunk in chunks:
        if chunk:
            return chunk
    return b""


def _is_stream(answer: Answer) -> bool:
    return answer.status == 200 and answer.headers.get("content-type", "").startswith("text/event-stream")


def _one_line(body: bytes) -> bytes:
    """A JSON body as the data of one event."""
    return b" ".join(body.split(b"\n"))


def _seconds(value: str | None) -> float:
    return float(value) if value and value.isdecimal() else 0.0
