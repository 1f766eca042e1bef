"""``POST /v1/chat/completions``, streamed and not."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from serve.api.chat_plan import chat_plan
from serve.api.chat_reader import ChatReader
from serve.api.chat_shape import ChatAnswer, ChatShape
from serve.api.fields import check_fields
from serve.api.generation import Choices, fold_unless_gone, submit
from serve.api.heading import Heading
from serve.api.middleware import CLIENT_CLOSED
from serve.api.models import check_model
from serve.api.routing import StrictRoute
from serve.api.sampling import check_room, sampling_params
from serve.api.schemas.chat import ChatCompletion, ChatCompletionRequest
from serve.api.schemas.common import ErrorResponse
from serve.api.sse import EVENT_STREAM, EventStream, event_frames
from serve.errors import InvalidRequest
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord
from serve.settings import Settings

router = APIRouter(route_class=StrictRoute, tags=["chat"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: {"content": EVENT_STREAM},
        **{status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 500, 503)},
    },
    summary="Answer a conversation",
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Generate the assistant's next message: one JSON object, or server-sent events with ``stream: true``."""
    settings: Settings = request.app.state.settings
    record: RequestRecord = request.scope["trimaran.record"]
    check_model(body.model, settings)
    headers = check_fields(body, settings)
    record.model, record.is_stream = settings.served_name, bool(body.stream)
    choices, readers = await start_chat(body, request.app.state.lifecycle, record)
    heading = Heading.new("chatcmpl-", settings)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        shape = ChatShape(heading, readers, include_usage=include_usage)
        frames = event_frames(choices, shape, settings.keep_alive_s, request.app.state.pace)
        return EventStream(frames, headers, choices.close)
    answer = ChatAnswer(heading, readers)
    if not await fold_unless_gone(choices, answer, request.receive):
        return Response(status_code=CLIENT_CLOSED)
    return Response(to_json(answer.body()), headers=headers, media_type="application/json")


async def start_chat(
    body: ChatCompletionRequest, lifecycle: Lifecycle, record: RequestRecord, *, is_clamped: bool = False
) -> tuple[Choices, list[ChatReader]]:
    """Render the conversation, queue its choices, and make a reader for each.

    ``is_clamped``: an answer may be as long as asked for or as fits, whichever is less.

    Raises:
        RequestError: the template refuses the messages, a schema cannot be enforced, or something does not fit.
        CapacityError: the queue is full, the model is not there yet, or the server is draining.
        EngineError: the model cannot be served.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    plan = await chat_plan(body, lifecycle, record.received_at)
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if is_clamped and wanted is not None:
        wanted = min(wanted, max(1, (lifecycle.max_model_len or 0) - len(plan.prompt)))
    check_room(len(plan.prompt), wanted, ("messages", name), lifecycle.max_model_len or 0)
    params = replace(sampling_params(body, wanted, lifecycle), grammar=plan.grammar)
    if plan.demands:
        params = replace(params, stop=(), stop_token_ids=frozenset())
    if body.logprobs:
        params = replace(params, logprobs=body.top_logprobs or 0)
    choices = submit(lifecycle, [plan.prompt], params, body.n or 1, record)
    token_bytes = lifecycle.token_bytes if body.logprobs else None
    return choices, [ChatReader(plan.parser(), token_bytes, is_single=plan.is_single) for _ in range(len(choices))]
