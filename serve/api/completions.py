"""``POST /v1/completions``: plain texts and token ids, streamed and not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from serve.api.completion_shape import CompletionAnswer, CompletionReader, CompletionShape, Prompt
from serve.api.fields import check_fields
from serve.api.generation import fold_unless_gone, submit
from serve.api.heading import Heading
from serve.api.logprobs import TextLogprobs
from serve.api.middleware import CLIENT_CLOSED
from serve.api.models import check_model
from serve.api.routing import StrictRoute
from serve.api.sampling import check_room, sampling_params
from serve.api.schemas.common import ErrorResponse
from serve.api.schemas.completions import DEFAULT_MAX_TOKENS, Completion, CompletionRequest
from serve.api.sse import EVENT_STREAM, EventStream, event_frames
from serve.chat.prompt import ChatFormat
from serve.errors import UnsupportedParameter
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord
from serve.settings import Settings
from serve.types import SamplingParams

router = APIRouter(route_class=StrictRoute, tags=["completions"])


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses={
        200: {"content": EVENT_STREAM},
        **{status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 500, 503)},
    },
    summary="Continue a text",
)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue each prompt: one JSON object, or server-sent events with ``stream: true``."""
    settings: Settings = request.app.state.settings
    lifecycle: Lifecycle = request.app.state.lifecycle
    record: RequestRecord = request.scope["trimaran.record"]
    check_model(body.model, settings)
    headers = check_fields(body, settings)
    n = body.n or 1
    if body.best_of not in (None, n):
        raise UnsupportedParameter(f"best_of is not supported by this server unless it is n = {n}", param="best_of")
    record.model, record.is_stream = settings.served_name, bool(body.stream)

    prompts = await lifecycle.read(lambda chat: _prompts(body, chat), record.received_at)
    params = _params(body, prompts, lifecycle)
    choices = submit(lifecycle, [prompt.token_ids for prompt in prompts], params, n, record)
    readers = [_reader(body, prompts[index // n], lifecycle) for index in range(len(choices))]
    heading = Heading.new("cmpl-", settings)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        shape = CompletionShape(heading, readers, n, include_usage=include_usage)
        frames = event_frames(choices, shape, settings.keep_alive_s, request.app.state.pace)
        return EventStream(frames, headers, choices.close)
    answer = CompletionAnswer(heading, readers, n)
    if not await fold_unless_gone(choices, answer, request.receive):
        return Response(status_code=CLIENT_CLOSED)
    return Response(to_json(answer.body()), headers=headers, media_type="application/json")


def _prompts(body: CompletionRequest, chat: ChatFormat) -> list[Prompt]:
    """The prompts in order; their texts are only known where they are needed."""
    prompt = body.prompt
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        prompt = [cast("list[int]", prompt)]
    found = [prompt] if isinstance(prompt, str) else cast("Sequence[str | list[int]]", prompt)
    return [_prompt(text_or_ids, chat, needs_text=bool(body.echo)) for text_or_ids in found]


def _prompt(prompt: str | list[int], chat: ChatFormat, *, needs_text: bool) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(text=prompt, token_ids=chat.text_prompt(prompt))
    text = chat.tokenizer.decode(prompt, skips_special=False) if needs_text else ""
    return Prompt(text=text, token_ids=tuple(prompt))


def _params(body: CompletionRequest, prompts: Sequence[Prompt], lifecycle: Lifecycle) -> SamplingParams:
    """Like every route's, and the prompt's log-probabilities too where prompt and log-probabilities are asked for."""
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    check_room(longest, max_tokens, ("prompt", "max_tokens"), lifecycle.max_model_len or 0)
    params = sampling_params(body, max_tokens, lifecycle)
    return replace(params, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None)


def _reader(body: CompletionRequest, prompt: Prompt, lifecycle: Lifecycle) -> CompletionReader:
    logprobs = None if body.logprobs is None else TextLogprobs(lifecycle.token_bytes)
    return CompletionReader(prompt if body.echo else None, logprobs, generates=body.max_tokens != 0)
