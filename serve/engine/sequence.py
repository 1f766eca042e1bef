"""What a step is made of: sequences, chunks of their prompts, and moves within the KV cache.  Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve.types import FinishReason, GenerationRequest, Grammar, SamplingParams, Usage


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One request's tokens inside the engine."""

    request: GenerationRequest
    slot: int = -1
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache once every launched step has ended."""
    num_cached_tokens: int = 0
    """Those of them that another sequence had computed."""
    output_token_ids: list[int] = field(default_factory=list[int])
    num_pending_tokens: int = 0
    """Tokens after those, drawn by launched steps that were not read yet: only the device knows them."""
    finish_reason: FinishReason | None = None
    end_token_ids: frozenset[int] = frozenset()
    """Tokens that end this sequence."""
    grammar: Grammar | None = None
    sampler_state: Any = None
    """What the sampler remembers of this sequence."""
    params: SamplingParams = field(init=False)
    changes_logits: bool = field(init=False)

    def __post_init__(self) -> None:
        self.params = self.request.params
        self.changes_logits = self.params.changes_logits

    @property
    def scope(self) -> str:
        """Whose it is: prefixes are shared, and turns are taken, by this."""
        return self.request.cache_scope

    @property
    def awaits_min_tokens(self) -> bool:
        """Whether it is too early for the next token to end this sequence."""
        return self.num_drawn_tokens < self.params.min_tokens

    @property
    def num_drawn_tokens(self) -> int:
        """Generated tokens, also those that only the device knows."""
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def is_ending(self) -> bool:
        """Whether its last token was drawn already, whatever it is."""
        return self.num_drawn_tokens == self.params.max_tokens

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt."""
        return self.request.prompt_token_ids

    @property
    def num_prompt_tokens_left(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return max(0, len(self.prompt_token_ids) - self.num_computed_tokens)

    @property
    def num_settled_tokens(self) -> int:
        """Computed tokens without the newest one known: a step on a guess may have computed that, too."""
        return min(self.num_computed_tokens, len(self.prompt_token_ids) + max(0, len(self.output_token_ids) - 1))

    @property
    def computed_token_ids(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return (*self.prompt_token_ids, *self.output_token_ids)[: self.num_computed_tokens]

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(len(self.prompt_token_ids), len(self.output_token_ids), self.num_cached_tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """``num_tokens`` of a prompt, beginning at position ``start``."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def completes_prompt(self) -> bool:
        """Whether this chunk's last token gives the first logits."""
        return self.start + self.num_tokens == len(self.sequence.prompt_token_ids)

    @property
    def predicted(self) -> tuple[int, ...]:
        """The prompt tokens that its logits predict: those after its own, but the last chunk's last predicts none."""
        return self.sequence.prompt_token_ids[self.start + 1 : self.start + self.num_tokens + 1]


@dataclass(frozen=True, slots=True)
class Move:
    """Copy the first ``num_tokens`` positions of a slot of the KV cache to another; ``is_swap``: exchange the slots."""

    source: int
    target: int
    num_tokens: int
    is_swap: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: first the moves, then one decode token of every running sequence, then prompt chunks."""

    moves: tuple[Move, ...]
    decodes: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token from this step, in the order of the logits' rows."""
        return self.decodes + tuple(chunk.sequence for chunk in self.chunks if chunk.completes_prompt)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)
