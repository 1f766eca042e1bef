"""The fields that every route which generates text shares, and the rule for what it does not know.

``IGNORED``, ``NEUTRAL``, ``REFUSED_EXTRAS`` and ``OTHER_ROUTES`` are the whole of that rule: a field of OpenAI's is
done, ignored by design, or refused by name unless its value asks for nothing; so is a field of compatible servers or of
another route that would change the answer; any other extra is accepted, and named in a header.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field

from serve.api.schemas.wire import INT64_MAX, RequestBody, Wire, at_most

MAX_STOP_STRINGS, MAX_STOP_TOKENS, MAX_LOGIT_BIAS, MAX_CHOICES = 4, 64, 1024, 128


class StreamOptions(Wire):
    """Only meaningful with ``stream: true``."""

    include_usage: bool | None = Field(None, description="Send one more chunk with the usage, before the end.")
    include_obfuscation: bool | None = Field(default=None, description="Ignored: chunks are never padded.")


class SamplingFields(RequestBody):
    """How text is generated, and how it is sent."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"user"})
    GENERATES: ClassVar[bool] = True

    temperature: Annotated[float | None, Field(ge=0, le=2, description="0 is greedy.")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="Keep the likeliest tokens up to this sum.")] = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31, description="0 and -1 keep the whole vocabulary.")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1, description="Keep what is at least so likely as the best.")] = None
    seed: Annotated[int | None, Field(ge=-INT64_MAX - 1, le=INT64_MAX, description="Choice i draws with seed + i.")] = (
        None
    )
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)]
        | None
    ) = Field(
        None,
        description="Where to end; the text holds nothing of it. Neither this nor stop_token_ids cuts a call that "
        "tool_choice demands.",
    )
    stop_token_ids: Annotated[
        list[int] | None, Field(max_length=MAX_STOP_TOKENS, description="Tokens to end at, as at the end of sequence.")
    ] = None
    min_tokens: Annotated[int | None, Field(ge=0, description="No end of sequence before so many tokens.")] = None
    ignore_eos: bool | None = Field(None, description="Go on after the end of sequence.")
    frequency_penalty: Annotated[
        float | None, Field(ge=-2, le=2, description="Subtracted for each time that a token was generated.")
    ] = None
    presence_penalty: Annotated[
        float | None, Field(ge=-2, le=2, description="Subtracted once a token was generated.")
    ] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10, description="1 is none.")] = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None,
        at_most(MAX_LOGIT_BIAS),
        Field(description="Token id to what is added to its logit."),
    ] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES, description="Choices for each prompt.")] = None
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Needs stream: true.")
    user: str | None = None


REFUSED_EXTRAS: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "no_repeat_ngram_size": (0,),
    "skip_special_tokens": (True,),
    "structured_outputs": ({},),
    "truncate_prompt_tokens": (),
    "typical_p": (1.0,),
    "use_beam_search": (False,),
}
"""Fields of compatible servers that would change the answer, with the values that ask for nothing."""

OTHER_ROUTES: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "input": (),
    "instructions": ("",),
    "logit_bias": ({},),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_output_tokens": (),
    "max_tokens": (),
    "messages": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "prompt": (),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "seed": (),
    "stop": ([],),
    "stop_sequences": ([],),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "system": ("", []),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields of one route that generates text, which on another one would change the answer, as above."""


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens: those that an earlier request had computed."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Of the generated tokens: those of the reasoning."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of one request.  A prompt counts once, however many choices were asked for."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
