"""``POST /tokenize`` and ``POST /detokenize``: what the model reads of a text, and the reverse."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from serve.api.conversation import template_variables, to_messages
from serve.api.fields import check_extras
from serve.api.logprobs import shown
from serve.api.models import check_model
from serve.api.routing import StrictRoute
from serve.api.schemas.common import ErrorResponse
from serve.api.schemas.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from serve.api.tools import tool_plan
from serve.chat.prompt import ChatFormat
from serve.errors import InvalidRequest
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord
from serve.settings import Settings

router = APIRouter(
    route_class=StrictRoute,
    tags=["tokens"],
    responses={status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 500, 503)},
)


@router.post("/tokenize", summary="Text to token ids")
async def tokenize(body: TokenizeRequest, request: Request, response: Response) -> TokenizeResponse:
    """The token ids of a text as a completion reads it, or of a conversation as a chat completion reads it."""
    settings: Settings = request.app.state.settings
    lifecycle: Lifecycle = request.app.state.lifecycle
    record: RequestRecord = request.scope["trimaran.record"]
    if body.model is not None:
        check_model(body.model, settings)
    response.headers.update(check_extras(body, settings))
    record.model = settings.served_name
    token_ids = await lifecycle.read(lambda chat: _tokens(body, chat), record.received_at)
    return TokenizeResponse(
        count=len(token_ids),
        max_model_len=lifecycle.max_model_len or 0,
        tokens=list(token_ids),
        token_strs=[shown(lifecycle.token_bytes(token_id)) for token_id in token_ids]
        if body.return_token_strs
        else None,
    )


def _tokens(body: TokenizeRequest, chat: ChatFormat) -> tuple[int, ...]:
    if (body.prompt is None) == (body.messages is None):
        given = "neither" if body.prompt is None else "both"
        raise InvalidRequest(f"{given} of prompt and messages is given; send one of them", param="prompt")
    if body.messages is not None:
        if body.add_special_tokens:
            raise InvalidRequest(
                "add_special_tokens is for prompt: a conversation has those of its template", param="add_special_tokens"
            )
        tools = tool_plan(body.tools, None, None).tools
        return chat.prompt(to_messages(body.messages), tools, template_variables(body.chat_template_kwargs))
    if body.tools:
        raise InvalidRequest("tools are for messages: a prompt has none", param="tools")
    return chat.text_prompt(body.prompt or "", adds_special=body.add_special_tokens is not False)


@router.post("/detokenize", summary="Token ids to text")
async def detokenize(body: DetokenizeRequest, request: Request, response: Response) -> DetokenizeResponse:
    """The text of token ids, control tokens included."""
    settings: Settings = request.app.state.settings
    lifecycle: Lifecycle = request.app.state.lifecycle
    record: RequestRecord = request.scope["trimaran.record"]
    if body.model is not None:
        check_model(body.model, settings)
    response.headers.update(check_extras(body, settings))
    record.model = settings.served_name
    text = await lifecycle.read(lambda chat: _text(body.tokens, chat, lifecycle.vocab_size), record.received_at)
    return DetokenizeResponse(prompt=text)


def _text(token_ids: list[int], chat: ChatFormat, vocab_size: int | None) -> str:
    for at, token_id in enumerate(token_ids):
        if not 0 <= token_id < (vocab_size or 2**31):
            raise InvalidRequest(
                f"tokens[{at}] is {token_id}, but this model's ids are 0 to {(vocab_size or 2**31) - 1}",
                param=f"tokens[{at}]",
            )
    return chat.tokenizer.decode(token_ids, skips_special=False)
