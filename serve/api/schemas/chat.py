"""The wire of ``POST /v1/chat/completions``: every field is named here, once.

Source: OpenAI's specification v2.3.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from serve.api.schemas.sampling import SamplingFields, Usage
from serve.api.schemas.structured import StructuredFields
from serve.api.schemas.tools import ToolChoice, ToolList
from serve.api.schemas.wire import Metadata, Objects, UnreadPart, Wire


class TextPart(Wire):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class RefusalPart(Wire):
    """An assistant's words when it declined, as text."""

    type: Literal["refusal"]
    refusal: str


class OtherPart(UnreadPart):
    """Any other piece, refused by name after validation."""

    type: Literal["image_url", "input_audio", "file", "video_url", "audio_url"] = Field(
        description="Only text and refusal are read; others are refused by name."
    )

    def replaced(self, note: str) -> TextPart | None:
        """The text in place of an image."""
        return TextPart(type="text", text=note) if self.type == "image_url" else None


Part = Annotated[TextPart | RefusalPart | OtherPart, Field(discriminator="type")]


class FunctionCall(Wire):
    """Which function is called; ``arguments`` is JSON in a string, as the model wrote it."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCall(Wire):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Wire):
    """One message of the conversation.  ``reasoning_content`` and ``reasoning`` are an assistant's earlier thoughts."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"] = Field(
        description="function is refused: deprecated, use tool."
    )
    content: str | Annotated[list[Part], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="Text, or parts of it; parts that are images, audio or files are refused by name."
    )
    name: str | None = Field(None, description="For templates that read it.")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(None, description="The assistant's.")
    tool_call_id: str | None = Field(None, description="Which call a message of role tool answers.")
    refusal: str | None = Field(None, description="Read in place of an assistant's content that is null.")
    reasoning_content: str | None = Field(None, description="For templates that read earlier thoughts.")
    reasoning: str | None = Field(None, description="Another name of reasoning_content.")
    function_call: dict[str, Any] | None = Field(None, description="Refused: deprecated, use tool_calls.")
    audio: dict[str, Any] | None = Field(None, description="Refused: an earlier answer in sound.")
    annotations: list[Any] | None = Field(None, description="Ignored.")


class ChatCompletionRequest(SamplingFields, StructuredFields):
    """The request body."""

    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata", "prediction", "prompt_cache_key", "prompt_cache_options",
            "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
        }
    )  # fmt: skip
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingFields.NEUTRAL,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "moderation": (),
        "verbosity": ("medium",),
    }
    CALLED: ClassVar[Mapping[str, str]] = {
        "input": "messages",
        "instructions": "a message of role system",
        "max_output_tokens": "max_completion_tokens",
        "prompt": "messages",
        "stop_sequences": "stop",
        "system": "a message of role system",
    }

    model: str = Field(description="An id that GET /v1/models lists.")
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] = Field(
        description="The conversation, oldest message first."
    )
    max_completion_tokens: Annotated[int | None, Field(ge=1, description="Null: all that fits.")] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Deprecated by OpenAI; max_completion_tokens wins.")] = (
        None
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Switches of the model's chat template, such as enable_thinking; never a template."
    )
    logprobs: bool | None = Field(None, description="Tell each token's log-probability.")
    top_logprobs: Annotated[int | None, Field(ge=0, le=20, description="Needs logprobs: true.")] = None
    tools: ToolList | None = Field(None, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(None, description="Whether it may, must or must not; null is auto.")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer.")
    functions: Objects | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: Annotated[list[str], Field(max_length=8)] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None,
        description="In the words of the model's chat template, 400 where it has none for it; a model that never "
        "reasons takes none and minimal.",
    )
    verbosity: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    store: bool | None = None
    metadata: Metadata = None
    service_tier: str | None = None


class FunctionCallOut(BaseModel):
    """Which function the model calls; ``arguments`` is the JSON of an object."""

    name: str
    arguments: str


class ToolCallOut(BaseModel):
    """One call of the model."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCallOut


class AssistantMessage(BaseModel):
    """The model's answer.  Calls and reasoning are absent where there are none; ``reasoning`` is another name."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    annotations: list[Any] = Field(default_factory=list)
    tool_calls: list[ToolCallOut] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        absent = {"tool_calls", "reasoning_content", "reasoning"}
        return {name: value for name, value in handler(self).items() if value is not None or name not in absent}


class TopLogprob(BaseModel):
    """One of the most likely tokens.  ``bytes`` are exact; ``token`` shows what is no character as U+FFFD."""

    token: str
    bytes: list[int] | None
    logprob: float


class ChatLogprob(TopLogprob):
    """A token of the content, and the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Those of a choice, or of a piece of it."""

    content: list[ChatLogprob] | None
    refusal: None = None


class Choice(BaseModel):
    """One completion."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] = "default"
    choices: list[Choice]
    usage: Usage


class Sparse(BaseModel):
    """Fields that say nothing are absent."""

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class FunctionDelta(Sparse):
    """What is added to a call: first its name, then pieces of its arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Sparse):
    """What is added to call ``index``; only the first delta of a call has its id and type."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(Sparse):
    """What a chunk adds; fields that it does not add are absent."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChunkChoice(BaseModel):
    """One choice of a chunk."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream.  ``usage`` is there only when the request asked for it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] = "default"
    choices: list[ChunkChoice]
    usage: Usage | None = None
