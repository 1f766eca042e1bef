"""The gateway's routes: OpenAI's, answered by a model elsewhere (``SERVE_ENGINE=remote``).

Keys, limits, health, playground and documentation stay this server's own; bodies pass through unread but for ``model``
and ``stream``, and streams chunk by chunk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from pydantic_core import from_json
from starlette.responses import Response
from starlette.types import Receive

from serve.api.auth import DOCUMENTED_SCHEMES
from serve.api.errors import error_json, message_error_json, show, speaks_anthropic, status_of
from serve.api.generation import wait_for_disconnect
from serve.api.middleware import CLIENT_CLOSED
from serve.api.routing import StrictRoute
from serve.api.schemas.common import ErrorResponse
from serve.api.sse import DONE, KEEP_ALIVE, EventStream, frame, named_frame
from serve.errors import EngineNotReady, ModelNotFound, QueueFull, ServeError, UpstreamFailed
from serve.observe import RequestRecord
from serve.passage import Passage, PassageEngine
from serve.settings import Settings
from serve.upstream import COLD, Answer, Upstream

logger = logging.getLogger(__name__)

POST_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
)  # fmt: skip
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 5.0
RETRY_AFTER_S = 10.0
PASSED_HEADERS = ("content-type", "retry-after", "x-ignored-parameters")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 502, 503)
}

router = APIRouter(route_class=StrictRoute, tags=["gateway"], dependencies=DOCUMENTED_SCHEMES)


async def _pass_on(body: dict[str, Any], request: Request) -> Response:
    """Answered by the remote model as its own documentation says; streamed with ``stream: true``."""
    record: RequestRecord = request.scope["trimaran.record"]
    record.model, record.is_stream = str(body.get("model"))[:200], body.get("stream") is True
    return await forward(request, request.url.path, await request.body())


for _path in POST_PATHS:
    router.add_api_route(
        _path,
        _pass_on,
        methods=["POST"],
        responses=_ERRORS,
        response_model=None,
        name=_path.removeprefix("/v1/").replace("/", "_"),
        summary=f"Pass {_path} on",
    )


@router.get("/v1/models", responses=_ERRORS, response_model=None, summary="List the remote's models")
async def list_models(request: Request) -> Response:
    """The remote's models."""
    return await forward(request, "/v1/models")


@router.get("/v1/models/{model:path}", responses=_ERRORS, response_model=None, summary="Describe a remote model")
async def get_model(model: str, request: Request) -> Response:
    """One of the remote's models."""
    if not model or set(model.split("/")) & {"", ".", ".."}:
        raise ModelNotFound("this is no model's id", param="model")
    return await forward(request, "/v1/models/" + quote(model, safe="/"))


async def forward(request: Request, path: str, body: bytes = b"") -> Response:
    """Send one request on, and its answer back.

    A remote that is not up yet is asked again until ``SERVE_LOAD_WAIT_S`` have passed.  A stream's caller gets comments
    meanwhile; after the first of them an error can only be an event.
    """
    settings: Settings = request.app.state.settings
    record: RequestRecord = request.scope["trimaran.record"]
    request.app.state.lifecycle.check_admission()
    engine = request.app.state.lifecycle.engine
    assert isinstance(engine, PassageEngine)  # noqa: S101 - as create_engine made it
    passage = engine.open()
    opening = passage.begin(_open(request, path, body, record, settings.load_wait_s, passage))
    is_handed_over = False
    try:
        patience_s = settings.keep_alive_s if record.is_stream else None
        is_here, answer = await _unless_gone(passage, opening, request.receive, patience_s)
        if not is_here:
            record.finish_reason = "abort"
            return Response(status_code=CLIENT_CLOSED)
        if answer is None or _is_stream(answer):
            is_handed_over = True
            return EventStream(_frames(passage, opening, settings.keep_alive_s, record), {}, passage.close)
        return await _whole(passage, answer, request.receive)
    finally:
        if not is_handed_over:
            passage.close()


async def _open(
    request: Request, path: str, body: bytes, record: RequestRecord, patience_s: float, passage: Passage
) -> Answer:
    """The remote's answer, asked for again while it is not up.

    Raises:
        EngineNotReady: it did not come up in time.
        UpstreamFailed: it broke off, or refuses the gateway's own key.
    """
    upstream: Upstream = request.app.state.upstream
    wait_s = FIRST_WAIT_S
    while True:
        after_s = 0.0
        try:
            answer = await upstream.send(request.method, path, body, record.request_id)
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


async def _whole(passage: Passage, answer: Answer, receive: Receive) -> Response:
    is_here, body = await _unless_gone(passage, passage.begin(_read(answer)), receive, None)
    if not is_here:
        return Response(status_code=CLIENT_CLOSED)
    if (refusal := _refusal(answer, body)) is not None:
        raise refusal
    headers = {name: answer.headers[name] for name in PASSED_HEADERS if name in answer.headers}
    return Response(body, answer.status, headers)


def _refusal(answer: Answer, body: bytes) -> ServeError | None:
    """An error page of the platform in front of the remote, as an error of ours; OpenAI's errors pass as they are."""
    if answer.status < 400:
        return None
    try:
        given: Any = from_json(body)
        if isinstance(given["error"]["message"], str):
            return None
    except (ValueError, KeyError, TypeError):
        pass
    if answer.status == 429:
        after_s = _seconds(answer.headers.get("retry-after")) or 1.0
        return QueueFull("the remote takes no more requests now", retry_after=after_s)
    return UpstreamFailed(f"the remote answered {answer.status}: {show(body[:200].decode(errors='replace'))}")


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
    passage: Passage, opening: asyncio.Task[Answer], keep_alive_s: float, record: RequestRecord
) -> AsyncIterator[bytes]:
    """The remote's bytes as they come, with comments between two events while nothing does."""
    try:
        while (answer := await passage.result(opening, keep_alive_s)) is None:
            yield KEEP_ALIVE
        if not _is_stream(answer):
            body = await passage.result(passage.begin(_read(answer))) or b""
            if (refusal := _refusal(answer, body)) is not None:
                raise refusal
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
    return float(value) if value and value.isdigit() else 0.0
