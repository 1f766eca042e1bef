"""A request's fields to :class:`~serve.types.SamplingParams`: one rule for every route that generates text."""

from __future__ import annotations

from serve.api.schemas.sampling import CompletionTokensDetails, PromptTokensDetails, SamplingFields, Usage
from serve.errors import ContextLengthExceeded, InvalidRequest
from serve.lifecycle import Lifecycle
from serve.types import SamplingParams
from serve.types import Usage as TokenUsage


def sampling_params(body: SamplingFields, max_tokens: int | None, lifecycle: Lifecycle) -> SamplingParams:
    """The request's values, else the model's own recommendation, else OpenAI's defaults.

    Raises:
        InvalidRequest: ``logit_bias`` names no token, or ``min_tokens`` exceeds ``max_tokens``.
    """
    if body.min_tokens and max_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {body.min_tokens}, more than the {max_tokens} asked for", param="min_tokens"
        )
    recommended = lifecycle.default_sampling

    def choose(value: float | None, name: str, default: float) -> float:
        return value if value is not None else recommended.get(name, default)

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=float(choose(body.temperature, "temperature", 1.0)),
        top_p=float(choose(body.top_p, "top_p", 1.0)),
        top_k=max(0, int(choose(body.top_k, "top_k", 0))),
        min_p=float(choose(body.min_p, "min_p", 0.0)),
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=tuple((_token_id(name), bias) for name, bias in (body.logit_bias or {}).items()),
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=frozenset(body.stop_token_ids or ()),
    )


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) < 10):
        raise InvalidRequest(f"logit_bias: {name[:40]!r} is no token id", param="logit_bias")
    return int(name)


def check_room(num_prompt_tokens: int, max_tokens: int | None, names: tuple[str, str], context: int) -> None:
    """Refuse what does not fit, before any work is done.

    Args:
        num_prompt_tokens: Of the longest prompt.
        max_tokens: Asked for; None is all that fits.
        names: The fields of the prompt and of ``max_tokens``.
        context: Tokens of prompt and completion together.

    Raises:
        ContextLengthExceeded: says all numbers.
    """
    room = context - num_prompt_tokens
    if room < 1 or (max_tokens or 0) > room:
        prompt, name = names
        asked = f" and {name} asks for {max_tokens}" if max_tokens else ""
        raise ContextLengthExceeded(
            f"this model's context is {context} tokens, but the prompt has {num_prompt_tokens}{asked}; "
            + (f"shorten the {prompt}" if room < 1 else f"lower {name} to at most {room}"),
            param=prompt if room < 1 else name,
        )


class UsageSum:
    """Tokens of a request's choices, of which ``n`` share each prompt."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._usages: dict[int, TokenUsage] = {}
        self._reasoning_tokens = 0

    def add(self, index: int, usage: TokenUsage, reasoning_tokens: int = 0) -> None:
        """Take the usage of choice ``index``, and how many of its tokens were reasoning."""
        self._usages[index] = usage
        self._reasoning_tokens += reasoning_tokens

    def total(self) -> Usage:
        """A prompt counts once, as cached only where every one of its choices found it so."""
        prompts = [
            [self._usages[index] for index in range(first, first + self._n)]
            for first in range(0, len(self._usages), self._n)
        ]
        prompt_tokens = sum(choices[0].prompt_tokens for choices in prompts)
        completion_tokens = sum(usage.completion_tokens for usage in self._usages.values())
        cached = sum(min(usage.cached_tokens for usage in choices) for choices in prompts)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=self._reasoning_tokens),
        )
