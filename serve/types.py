"""What crosses the boundaries between api, chat and engine.  Read this file first.

Standard library only: every layer may import it, and it knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from serve.errors import ServeError

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by them overflows."""

MIN_LOGPROB = -9999.0
"""Stands for the log-probability of what cannot be: JSON has no minus infinity."""


class FinishReason(StrEnum):
    """Why a sequence ended.  ``ABORT`` and ``ERROR`` never reach the wire as a finish reason."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"


class Grammar(Protocol):
    """Which tokens one sequence may take next.  Belongs to that sequence; used on the engine's thread alone."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""
        ...

    def allowed(self) -> bytes:
        """The next token's bit mask: 32-bit little-endian words, bit ``i % 32`` of word ``i // 32`` is token ``i``.

        The end-of-sequence token is among them where the sequence may end.  Words beyond the vocabulary are ignored,
        missing ones allow nothing.  Not asked for once :attr:`is_finished`.

        Raises:
            RequestError: the caller asked for what turns out to be too complex.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Go on with the token that was taken.  Not called for a token that ended the sequence.

        Raises:
            ValueError: :meth:`allowed` did not allow it.
            RequestError: as :meth:`allowed`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request turns logits into tokens.

    ``temperature`` 0 is greedy.  ``top_k`` 0 and ``top_p`` 1.0 and ``min_p`` 0.0 keep the whole vocabulary.
    ``seed`` fixes this request's own generator, whatever else is in the batch.  ``max_tokens`` counts
    generated tokens, the end-of-sequence token included; None is all that fits after the prompt.

    What changes the logits, in this order: ``repetition_penalty`` divides the positive and multiplies the negative
    ones of prompt and generated tokens; ``frequency_penalty`` and ``presence_penalty`` are subtracted from those of
    generated tokens (per occurrence, and once); ``logit_bias`` holds pairs of token id and what is added; before
    ``min_tokens`` tokens no sequence ends by an end-of-sequence or stop token; ``grammar`` makes the constraint of
    one sequence (cheaply: it is called on the engine's thread), which wins over ``min_tokens`` and, once finished,
    ends the sequence.  Then come temperature, top_k, top_p and min_p.

    With ``ignore_eos`` only ``stop_token_ids``, ``stop``, a finished grammar and ``max_tokens`` end a sequence.
    A stop token's text is no part of the answer.  ``logprobs`` is the number of most likely tokens reported beside
    each generated token, 0 for that token alone and None for nothing; ``prompt_logprobs`` the same for the prompt.
    They are of the model's own distribution, before everything above.  Token ids outside the vocabulary are refused
    by :func:`serve.engine.base.check_vocabulary`.
    """

    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Callable[[], Grammar] | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that occurred count."""
        return bool(self.frequency_penalty or self.presence_penalty) or self.repetition_penalty != 1.0

    @property
    def changes_logits(self) -> bool:
        """Whether every step draws from other logits than the model's (``min_tokens`` only concerns the first ones)."""
        return self.has_penalties or bool(self.logit_bias) or self.grammar is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt for the engine: token ids in, :class:`TokenEvent` out.

    ``cache_scope`` names whose prompts may share computed prefixes: the caller's key id, so that no key can time
    what another one asked.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    cache_scope: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, as they are billed.  ``cached_tokens`` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's natural log-probability, and the most likely tokens at its place, best first.

    Never below :data:`MIN_LOGPROB`.  ``Lifecycle.token_bytes`` gives the bytes of any of the ids.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One generated token of one request.

    ``text`` may be empty: a character or a possible stop string is still incomplete.  The last event of a
    request carries ``finish_reason`` and ``usage``, and ``stop`` when one of its stop strings ended it; with
    ``FinishReason.ERROR`` it also carries ``error``.
    The first carries ``queue_s``, the seconds that the request waited for a slot.

    When asked for, ``logprobs`` are those of the tokens whose text this event began to release: none while text is
    held back, several once it comes.  All events' together are, in order, those of the tokens of the returned text:
    no end-of-sequence or stop token (``end_logprob`` is that one's), none of a stop string.  The first event also
    carries ``prompt_logprobs``, one for each prompt token (None for the first, which nothing predicts).
    """

    text: str = ""
    token_id: int | None = None
    finish_reason: FinishReason | None = None
    stop: str | None = None
    usage: Usage | None = None
    error: ServeError | None = None
    queue_s: float | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    end_logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Batching:
    """Whether requests run in one batch, and if not, why; they then take turns, token by token."""

    enabled: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine's load and of its signs of life.

    ``step_age_s`` is how long the present step has been running, 0.0 between steps; ``token_age_s`` the time since the
    last token of any request; ``num_bad_steps`` how many of the last steps, in a row, gave no finite row of logits.
    """

    num_waiting: int
    num_running: int
    num_slots: int
    num_steps: int = 0
    step_age_s: float = 0.0
    token_age_s: float = 0.0
    num_bad_steps: int = 0
