"""What crosses the boundaries between api, chat and engine.  Read this file first.

Standard library only: every layer may import it, and it knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from serve.errors import ServeError

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by them overflows."""


class FinishReason(StrEnum):
    """Why a sequence ended.  ``ABORT`` and ``ERROR`` never reach the wire as a finish reason."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request turns logits into tokens.

    ``temperature`` 0 is greedy.  ``top_k`` 0 and ``top_p`` 1.0 and ``min_p`` 0.0 keep the whole vocabulary.
    ``seed`` fixes this request's own generator, whatever else is in the batch.  ``max_tokens`` counts
    generated tokens, the end-of-sequence token included; None is all that fits after the prompt.
    """

    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt for the engine: token ids in, :class:`TokenEvent` out."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, as they are billed."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One generated token of one request.

    ``text`` may be empty: a character or a possible stop string is still incomplete.  The last event of a
    request carries ``finish_reason`` and ``usage``; with ``FinishReason.ERROR`` it also carries ``error``.
    The first carries ``queue_s``, the seconds that the request waited for a slot.
    """

    text: str = ""
    token_id: int | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: ServeError | None = None
    queue_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine's load."""

    num_waiting: int
    num_running: int
    num_slots: int
    num_steps: int = 0
