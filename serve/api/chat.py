"""``POST /v1/chat/completions``, streamed and not."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from serve.api.auth import DOCUMENTED_SCHEMES
from serve.api.completion import Completion, RecordedStream, fold_unless_gone
from serve.api.middleware import CLIENT_CLOSED
from serve.api.models import check_model
from serve.api.routing import StrictRoute
from serve.api.schemas.chat import (
    NEUTRAL,
    UNSUPPORTED_EXTRAS,
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChunkChoice,
    Delta,
    Message,
    TextPart,
    Usage,
)
from serve.api.schemas.common import ErrorResponse
from serve.api.sse import DONE, EventStream, event_frames, frame
from serve.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord
from serve.settings import Settings
from serve.types import GenerationRequest, SamplingParams, TokenEvent
from serve.types import Usage as TokenUsage

router = APIRouter(route_class=StrictRoute, tags=["chat"], dependencies=DOCUMENTED_SCHEMES)

_TEXT = "\x00text"
"""Stands for a chunk's text while its frame is made once; no JSON string of ours holds a NUL otherwise."""

PART_JOINER = "\n"
"""Between the text parts of one message."""


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **{status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 500, 503)},
    },
    summary="Answer a conversation",
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Generate the assistant's next message: one JSON object, or server-sent events with ``stream: true``."""
    settings: Settings = request.app.state.settings
    lifecycle: Lifecycle = request.app.state.lifecycle
    record: RequestRecord = request.scope["trimaran.record"]
    check_model(body.model, settings)
    check_supported(body)
    record.model, record.is_stream = settings.served_name, bool(body.stream)

    prompt = await lifecycle.prompt(to_messages(body.messages), record.received_at)
    record.prompt_tokens = len(prompt)
    params = sampling_params(body, len(prompt), lifecycle)
    generation = GenerationRequest(request_id=uuid.uuid4().hex, prompt_token_ids=prompt, params=params)
    stream = RecordedStream(lifecycle.submit(generation, record.received_at), record)

    completion_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    headers = ignored_header(body)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        shape = ChatShape(completion_id, created, settings.served_name, include_usage)
        return EventStream(event_frames(stream, shape, settings.keep_alive_s), headers, stream.close)
    completion = await fold_unless_gone(stream, request.receive)
    if completion is None:
        return Response(status_code=CLIENT_CLOSED)
    answer = to_json(chat_completion(completion, completion_id, created, settings.served_name))
    return Response(answer, headers=headers, media_type="application/json")


def check_supported(body: ChatCompletionRequest) -> None:
    """Refuse by name what would have to change the answer and does not yet.

    Raises:
        UnsupportedParameter: names the field.
        InvalidRequest: ``stream_options`` without ``stream``.
    """
    for name, neutral in NEUTRAL.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            raise UnsupportedParameter(f"{name} is not supported by this server; leave it out", param=name)
    for name in sorted(UNSUPPORTED_EXTRAS & set(body.model_extra or ())):
        if (body.model_extra or {})[name] is not None:
            raise UnsupportedParameter(f"{name} is not supported by this server; leave it out", param=name)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")


def ignored_header(body: ChatCompletionRequest) -> dict[str, str]:
    """Name the unknown fields that were accepted without effect."""
    unknown = sorted(name for name in body.model_extra or () if name not in UNSUPPORTED_EXTRAS)
    shown = [name for name in unknown if name.isascii() and name.isprintable() and len(name) <= 64][:20]
    return {"x-ignored-parameters": ", ".join(shown)} if shown else {}


def to_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """What a chat template reads: role and text.

    Raises:
        InvalidRequest: a message without content.
        UnsupportedParameter: tools, or a part that is not text.
    """
    return [_to_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _to_message(message: Message, where: str) -> dict[str, Any]:
    if message.tool_calls or message.tool_call_id or message.role in {"tool", "function"}:
        name = "tool_calls" if message.tool_calls else "role"
        raise UnsupportedParameter(f"{where}: tools are not supported by this server yet", param=f"{where}.{name}")
    if message.content is None:
        raise InvalidRequest(f"{where}.content is missing; send a string", param=f"{where}.content")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _text(message.content, f"{where}.content")}


def _text(content: str | list[Any], where: str) -> str:
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if not isinstance(part, TextPart):
            raise UnsupportedParameter(
                f"{where}[{index}] is of type {part.type}; this model reads text only", param=f"{where}[{index}]"
            )
    return PART_JOINER.join(part.text for part in content)


def sampling_params(body: ChatCompletionRequest, num_prompt_tokens: int, lifecycle: Lifecycle) -> SamplingParams:
    """The request's values, else the model's own recommendation, else OpenAI's defaults.

    Raises:
        ContextLengthExceeded: prompt and completion do not fit; says the numbers.
    """
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    max_tokens = _max_tokens(wanted, name, num_prompt_tokens, lifecycle.max_model_len or 0)
    recommended: Mapping[str, float] = lifecycle.default_sampling
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())

    def choose(value: float | None, name: str, default: float) -> float:
        return value if value is not None else recommended.get(name, default)

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=float(choose(body.temperature, "temperature", 1.0)),
        top_p=float(choose(body.top_p, "top_p", 1.0)),
        top_k=int(choose(body.top_k, "top_k", 0)),
        min_p=float(choose(body.min_p, "min_p", 0.0)),
        seed=body.seed,
        stop=stop,
    )


def _max_tokens(wanted: int | None, name: str, num_prompt_tokens: int, context: int) -> int | None:
    """What was asked for, if it fits; None stays None: the engine gives all that fits."""
    room = context - num_prompt_tokens
    if room < 1 or (wanted or 0) > room:
        asked = f" and {name} asks for {wanted}" if wanted else ""
        raise ContextLengthExceeded(
            f"this model's context is {context} tokens, but the prompt has {num_prompt_tokens}{asked}; "
            + ("shorten the messages" if room < 1 else f"lower {name} to at most {room}"),
            param="messages" if room < 1 else name,
        )
    return wanted


def _usage(usage: TokenUsage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, total_tokens=usage.total_tokens
    )


def chat_completion(completion: Completion, completion_id: str, created: int, model: str) -> ChatCompletion:
    """The whole answer."""
    message = AssistantMessage(content=completion.text)
    choice = Choice(index=0, message=message, finish_reason=completion.finish_reason.value)  # pyright: ignore[reportArgumentType]
    return ChatCompletion(
        id=completion_id, created=created, model=model, choices=[choice], usage=_usage(completion.usage)
    )


class ChatShape:
    """Events to chunks.  The frame around a text is made once, since there is one for each token."""

    def __init__(self, completion_id: str, created: int, model: str, include_usage: bool) -> None:
        self._base: dict[str, Any] = {"id": completion_id, "created": created, "model": model}
        self._include_usage = include_usage
        before, _, after = self._chunk(Delta(content=_TEXT)).partition(to_json(_TEXT))
        self._before, self._after = before, after
        self._has_role = False

    def frames(self, event: TokenEvent) -> Iterable[bytes]:
        """Role first, then text, then the finish reason, the usage when asked for, and ``[DONE]``."""
        if not self._has_role:
            self._has_role = True
            yield self._chunk(Delta(role="assistant", content=""))
        if event.text:
            yield self._before + to_json(event.text) + self._after
        if event.finish_reason is not None:
            yield self._chunk(Delta(), finish_reason=event.finish_reason.value)
            if self._include_usage and event.usage is not None:
                usage = ChatCompletionChunk(**self._base, choices=[], usage=_usage(event.usage))
                yield frame(to_json(usage))
            yield DONE

    def _chunk(self, delta: Delta, finish_reason: Any = None) -> bytes:
        choice = ChunkChoice(index=0, delta=delta, finish_reason=finish_reason)
        chunk = ChatCompletionChunk(**self._base, choices=[choice])
        return frame(chunk.model_dump_json(exclude=None if self._include_usage else {"usage"}).encode())
