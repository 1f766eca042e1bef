"""The wire of ``POST /v1/embeddings``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field

from serve.api.schemas.completions import TokenIds
from serve.api.schemas.wire import Wire

MAX_INPUTS = 2048


class EmbeddingRequest(Wire):
    """The request body."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"user"})

    model: str = Field(description="An id that GET /v1/models lists.")
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
        ]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    ) = Field(description="A text, token ids (with the model's special tokens), or a list of either.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64 is little-endian float32. Default: float."
    )
    dimensions: Annotated[int | None, Field(ge=1, description="Only sizes that the model was trained for.")] = None
    user: str | None = None


class Embedding(BaseModel):
    """One text's vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
