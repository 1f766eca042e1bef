"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``: Anthropic's wire."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from serve.api.chat_plan import chat_prompt
from serve.api.fields import check_fields
from serve.api.generation import fold_unless_gone
from serve.api.messages_input import chat_fields, names
from serve.api.messages_shape import MessageAnswer, MessageShape
from serve.api.middleware import CLIENT_CLOSED
from serve.api.models import check_model
from serve.api.routing import StrictRoute
from serve.api.schemas.message_events import AnthropicMessage, MessageErrorResponse, TokenCount
from serve.api.schemas.messages import CountTokensRequest, MessagesRequest
from serve.api.sse import EVENT_STREAM, EventStream, event_frames
from serve.api.translation import start_turn, to_chat
from serve.observe import RequestRecord
from serve.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": MessageErrorResponse} for status in (400, 401, 404, 413, 415, 429, 500, 503)
}

router = APIRouter(route_class=StrictRoute, tags=["messages"], responses=ERRORS)


@router.post(
    "/v1/messages",
    response_model=AnthropicMessage,
    responses={200: {"content": EVENT_STREAM}},
    summary="Answer a conversation, in Anthropic's form",
)
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Generate the assistant's next message: one JSON object, or server-sent events with ``stream: true``."""
    settings: Settings = request.app.state.settings
    record: RequestRecord = request.scope["trimaran.record"]
    headers = _begin(body, settings, record)
    record.is_stream = bool(body.stream)
    fields = chat_fields(body)
    with names(body).applied():
        chat = to_chat(fields).model_copy(update={"stop": body.stop_sequences})
        choices, reader = await start_turn(chat, request.app.state.lifecycle, record, is_clamped=True)
    answer = MessageAnswer(settings.served_name, record.prompt_tokens or 0, body.max_tokens, reader)
    if body.stream:
        shape = MessageShape(answer, record.request_id)
        frames = event_frames(choices, shape, settings.keep_alive_s, request.app.state.pace)
        return EventStream(frames, headers, choices.close)
    if not await fold_unless_gone(choices, answer, request.receive):
        return Response(status_code=CLIENT_CLOSED)
    return Response(to_json(answer.body()), headers=headers, media_type="application/json")


@router.post(
    "/v1/messages/count_tokens",
    response_model=TokenCount,
    summary="Count a conversation's tokens, in Anthropic's form",
)
async def count_message_tokens(body: CountTokensRequest, request: Request) -> Response:
    """The tokens of the prompt that the same fields would make for an answer."""
    record: RequestRecord = request.scope["trimaran.record"]
    headers = _begin(body, request.app.state.settings, record)
    fields = chat_fields(body)
    with names(body).applied():
        prompt = await chat_prompt(to_chat(fields), request.app.state.lifecycle, record.received_at)
    return Response(to_json(TokenCount(input_tokens=len(prompt))), headers=headers, media_type="application/json")


def _begin(body: CountTokensRequest, settings: Settings, record: RequestRecord) -> dict[str, str]:
    check_model(body.model, settings)
    record.model = settings.served_name
    return check_fields(body, settings)
