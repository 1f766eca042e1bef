"""The wire of ``POST /v1/messages``: what an answer holds, whole and as events."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
ErrorKind = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "request_too_large",
    "rate_limit_error", "api_error", "overloaded_error", "timeout_error",
]  # fmt: skip


class MessageErrorBody(BaseModel):
    """What went wrong."""

    type: ErrorKind
    message: str


class MessageErrorResponse(BaseModel):
    """Every error below ``/v1/messages``, also the last event of a stream that failed."""

    type: Literal["error"] = "error"
    error: MessageErrorBody
    request_id: str | None


class TextContent(BaseModel):
    """Text of the answer."""

    type: Literal["text"] = "text"
    text: str
    citations: None = None


class ThinkingContent(BaseModel):
    """What the model thought first.  ``signature`` is empty: nobody but this server's caller reads it again."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: Literal[""] = ""


class DirectCaller(BaseModel):
    """The model itself called."""

    type: Literal["direct"] = "direct"


class ToolUseContent(BaseModel):
    """A call of one of the request's tools."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]
    caller: DirectCaller = DirectCaller()


Content = TextContent | ThinkingContent | ToolUseContent


class OutputTokensDetails(BaseModel):
    """Of the generated tokens: those of the thoughts."""

    thinking_tokens: int


class MessageDeltaUsage(BaseModel):
    """Tokens of a request.  Those of the prompt that were in the cache count as ``cache_read_input_tokens`` alone."""

    input_tokens: int
    cache_creation_input_tokens: Literal[0] = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    server_tool_use: None = None


class MessageUsage(MessageDeltaUsage):
    """The same, in a message."""

    cache_creation: None = None
    inference_geo: None = None
    service_tier: Literal["standard"] = "standard"


class AnthropicMessage(BaseModel):
    """The whole answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Content]
    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None = None
    container: None = None
    usage: MessageUsage


class TokenCount(BaseModel):
    """The prompt's tokens."""

    input_tokens: int


class MessageStart(BaseModel):
    """The first event: the message without content."""

    type: Literal["message_start"] = "message_start"
    message: AnthropicMessage


class ContentBlockStart(BaseModel):
    """A block begins, empty."""

    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: Content


class TextDelta(BaseModel):
    """More text."""

    type: Literal["text_delta"] = "text_delta"
    text: str


class ThinkingDelta(BaseModel):
    """More thoughts."""

    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class InputJsonDelta(BaseModel):
    """More of a call's input, as a piece of JSON text."""

    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


class ContentBlockDelta(BaseModel):
    """A block grows."""

    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class ContentBlockStop(BaseModel):
    """A block is complete."""

    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class StopDelta(BaseModel):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None
    stop_details: None = None
    container: None = None


class MessageDelta(BaseModel):
    """The message ends."""

    type: Literal["message_delta"] = "message_delta"
    delta: StopDelta
    usage: MessageDeltaUsage


class MessageStop(BaseModel):
    """The last event."""

    type: Literal["message_stop"] = "message_stop"


class Ping(BaseModel):
    """Nothing new; the connection lives."""

    type: Literal["ping"] = "ping"
