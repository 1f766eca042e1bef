"""``POST /v1/chat/completions``, streamed and not."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from serve.api.auth import DOCUMENTED_SCHEMES
from serve.api.chat_shape import ChatAnswer, ChatShape, Heading
from serve.api.conversation import template_variables, to_messages
from serve.api.fields import check_fields
from serve.api.generation import Choices, fold_unless_gone, submit
from serve.api.middleware import CLIENT_CLOSED
from serve.api.models import check_model, fingerprint
from serve.api.routing import StrictRoute
from serve.api.sampling import check_room, sampling_params
from serve.api.schemas.chat import ChatCompletion, ChatCompletionRequest
from serve.api.schemas.common import ErrorResponse
from serve.api.sse import EventStream, event_frames
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord
from serve.settings import Settings

router = APIRouter(route_class=StrictRoute, tags=["chat"], dependencies=DOCUMENTED_SCHEMES)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: {"content": {"text/event-stream": {}}},
        **{status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 500, 503)},
    },
    summary="Answer a conversation",
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Generate the assistant's next message: one JSON object, or server-sent events with ``stream: true``."""
    settings: Settings = request.app.state.settings
    record: RequestRecord = request.scope["trimaran.record"]
    check_model(body.model, settings)
    headers = check_fields(body, strict=settings.strict)
    record.model, record.is_stream = settings.served_name, bool(body.stream)
    choices = await start_chat(body, request.app.state.lifecycle, record)
    heading = chat_heading(settings)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        shape = ChatShape(heading, len(choices), include_usage=include_usage)
        frames = event_frames(choices, shape, settings.keep_alive_s, request.app.state.pace)
        return EventStream(frames, headers, choices.close)
    answer = ChatAnswer(heading, len(choices))
    if not await fold_unless_gone(choices, answer, request.receive):
        return Response(status_code=CLIENT_CLOSED)
    return Response(to_json(answer.body()), headers=headers, media_type="application/json")


def chat_heading(settings: Settings) -> Heading:
    """What one answer's chunks have in common, new for each answer."""
    name = settings.served_name
    return Heading(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), name, fingerprint(name))


async def start_chat(body: ChatCompletionRequest, lifecycle: Lifecycle, record: RequestRecord) -> Choices:
    """Render the conversation and queue its choices.

    Raises:
        RequestError: the template refuses the messages, or something does not fit.
        CapacityError: the queue is full, the model is not there yet, or the server is draining.
        EngineError: the model cannot be served.
    """
    variables = template_variables(body.chat_template_kwargs)
    messages = to_messages(body.messages)
    prompt = await lifecycle.read(lambda chat: chat.prompt(messages, variables=variables), record.received_at)
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    check_room(len(prompt), wanted, ("messages", name), lifecycle.max_model_len or 0)
    return submit(lifecycle, [prompt], sampling_params(body, wanted, lifecycle), body.n or 1, record)
