"""The wire of ``POST /tokenize`` and ``POST /detokenize``, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from serve.api.schemas.chat import Message
from serve.api.schemas.tools import ToolList
from serve.api.schemas.wire import Wire


class TokenizeRequest(Wire):
    """A text or a conversation: exactly one of ``prompt`` and ``messages``."""

    model: str | None = Field(None, description="Default: the model that is served.")
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Add what begins every text of the model. Default: true for prompt, false for messages."
    )
    tools: ToolList | None = Field(None, description="Beside messages: as in a chat completion.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="As in a chat completion.")
    return_token_strs: bool | None = None


class TokenizeResponse(BaseModel):
    """The tokens.  ``token_strs`` is null unless asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Wire):
    """Token ids."""

    model: str | None = Field(None, description="Default: the model that is served.")
    tokens: Annotated[list[int], Field(fail_fast=True)]


class DetokenizeResponse(BaseModel):
    """Their text, control tokens included."""

    prompt: str
