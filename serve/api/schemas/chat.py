"""The wire of ``POST /v1/chat/completions``: every field is named here, once.

Sources: OpenAI's specification v2.3.0.  Fields that clients of compatible servers send besides (``top_k``, ``min_p``)
are ours.  ``UNSUPPORTED`` is what the contract knows and this server refuses by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

MAX_STOP_STRINGS = 4
INT64_MAX = 2**63 - 1


class Wire(BaseModel):
    """Types are taken literally: ``"5"`` is no number."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class TextPart(Wire):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class OtherPart(Wire):
    """Any other piece, refused by name after validation."""

    type: Literal["image_url", "input_audio", "file", "refusal", "video_url", "audio_url"]


Part = Annotated[TextPart | OtherPart, Field(discriminator="type")]


MAX_METADATA, MAX_LOGIT_BIAS = 16, 1024


def _at_most(limit: int) -> BeforeValidator:
    """Count an object's entries before each of them is checked and explained."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(cast("dict[Any, Any]", value)) > limit:
            raise ValueError(f"there may be at most {limit} entries")
        return cast("Any", value)

    return BeforeValidator(check)


Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
"""Lists stop at their first wrong item: a body with a million of them must not cost a million explanations."""


class Message(Wire):
    """One message of the conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Objects | None = None
    tool_call_id: str | None = None
    refusal: str | None = None


class StreamOptions(Wire):
    """Only meaningful with ``stream: true``."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatCompletionRequest(Wire):
    """The request body."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Deprecated by OpenAI; max_completion_tokens wins.")] = (
        None
    )
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=2**31, description="0 keeps the whole vocabulary.")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-INT64_MAX - 1, le=INT64_MAX)] = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    logit_bias: Annotated[dict[str, float] | None, _at_most(MAX_LOGIT_BIAS)] = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Objects | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: Annotated[list[str], Field(max_length=8)] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    # Accepted without effect: they do not change what a single model on its own server answers.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str] | None, _at_most(MAX_METADATA)] = None
    service_tier: str | None = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
"""Fields not implemented yet, with the values that ask for nothing and are accepted."""

UNSUPPORTED_EXTRAS = frozenset(
    {
        "best_of", "chat_template", "chat_template_kwargs", "documents", "echo", "guided_choice", "guided_grammar",
        "guided_json", "guided_regex", "ignore_eos", "length_penalty", "min_tokens", "repetition_penalty",
        "stop_token_ids", "structured_outputs", "suffix", "use_beam_search",
    }
)  # fmt: skip
"""Fields of compatible servers that would change the answer: refused by name, never ignored."""


class Usage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None


class Choice(BaseModel):
    """One completion."""

    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds; fields that it does not add are absent."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ChunkChoice(BaseModel):
    """One choice of a chunk."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream.  ``usage`` is there only when the request asked for it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
