"""The wire of ``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from serve.api.schemas.sampling import MAX_CHOICES, SamplingFields, Usage

DEFAULT_MAX_TOKENS = 16
MAX_TOP_LOGPROBS = 5

TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """The request body."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SamplingFields.NEUTRAL, "suffix": ("",)}
    CALLED: ClassVar[Mapping[str, str]] = {
        "input": "prompt",
        "max_completion_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "messages": "prompt",
        "stop_sequences": "stop",
        "top_logprobs": "logprobs",
    }

    model: str = Field(description="An id that GET /v1/models lists.")
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    ) = Field(description="A text, token ids, or a list of either.  Control tokens in a text are control tokens.")
    max_tokens: Annotated[int | None, Field(ge=0, description=f"Default {DEFAULT_MAX_TOKENS}.")] = None
    echo: bool | None = Field(None, description="Begin the text, and the log-probabilities, with the prompt.")
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS, description="Of the likeliest tokens.")] = None
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES, description="Only the value of n.")] = None
    suffix: str | None = None


class CompletionLogprobs(BaseModel):
    """One entry for each token.  What nothing predicts, the first token of an echoed prompt, has null.

    ``text_offset`` counts the characters of ``text`` before the token; a token that is no whole character is written
    as ``bytes:\\xe2\\x80``.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The whole answer, and one event of a stream: the latter has ``usage`` only when the request asked for it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
