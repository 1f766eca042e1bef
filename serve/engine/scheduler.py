"""Decides what runs in each step: admission, chunked prefill, slots, when a sequence ends.

Torch-free, thread-free: the worker owns it, and its rules are tested in milliseconds.

Slots: running sequences own slots ``0..n-1`` (a decode batch is then one view of the KV cache, without a copy),
prefilling ones the slots after them.  When a sequence leaves, the last running one moves into its slot; the
:class:`Move` orders say which rows of the cache follow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from serve.types import FinishReason, GenerationRequest, Grammar, SamplingParams, Usage

PROMPT_LOGPROB_TOKENS = 64
"""Of a prompt whose log-probabilities are asked for, at most this many tokens a step: each gives a row of logits."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One request's tokens inside the engine."""

    request: GenerationRequest
    slot: int = -1
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache."""
    output_token_ids: list[int] = field(default_factory=list[int])
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
    def awaits_min_tokens(self) -> bool:
        """Whether it is too early for a token that ends this sequence."""
        return len(self.output_token_ids) < self.params.min_tokens

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt."""
        return self.request.prompt_token_ids

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt is in the cache, so that each step adds one token."""
        return self.num_computed_tokens >= len(self.prompt_token_ids)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(len(self.prompt_token_ids), len(self.output_token_ids))


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
    """Copy the first ``num_tokens`` positions of a slot of the KV cache to another."""

    source: int
    target: int
    num_tokens: int


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


class Scheduler:
    """Waiting, prefilling and running sequences over ``num_slots`` slots of the KV cache."""

    def __init__(self, *, num_slots: int, prefill_chunk_tokens: int, eos_token_ids: frozenset[int]) -> None:
        self.num_slots = num_slots
        self._chunk_tokens = prefill_chunk_tokens
        self._eos_token_ids = eos_token_ids
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self._moves: list[Move] = []

    def add(self, request: GenerationRequest) -> Sequence:
        """Queue a request behind the others."""
        params = request.params
        end_token_ids = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self._eos_token_ids
        sequence = Sequence(request, end_token_ids=end_token_ids)
        self.waiting.append(sequence)
        return sequence

    @property
    def has_work(self) -> bool:
        """Whether the next step would do anything."""
        return bool(self.waiting or self.prefilling or self.running)

    def schedule(self) -> Batch:
        """Choose the next step's work: all running sequences, and prompts up to the token budget."""
        budget = self._chunk_tokens
        chunks: list[Chunk] = []
        prefilling = iter(tuple(self.prefilling))
        while budget and (sequence := next(prefilling, None) or self._admit()):
            chunks.append(self._chunk(sequence, budget))
            # Prompts are completed in order, since their slots follow those of the running sequences in order.
            budget = budget - chunks[-1].num_tokens if chunks[-1].completes_prompt else 0
        moves, self._moves = tuple(self._moves), []
        return Batch(moves, tuple(self.running), tuple(chunks))

    def _admit(self) -> Sequence | None:
        num_taken = len(self.running) + len(self.prefilling)
        if not self.waiting or num_taken == self.num_slots:
            return None
        sequence = self.waiting.popleft()
        sequence.slot = num_taken
        self.prefilling.append(sequence)
        return sequence

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start = sequence.num_computed_tokens
        if sequence.params.prompt_logprobs is not None:
            budget = min(budget, PROMPT_LOGPROB_TOKENS)
        return Chunk(sequence, start, min(budget, len(sequence.prompt_token_ids) - start))

    def complete(self, batch: Batch, token_ids: list[int]) -> None:
        """Record the step: one token for each of ``batch.sampled``, and which sequences ended by themselves.

        Finished sequences keep their slot until :meth:`release`, so that a stop string can still end others.
        """
        for sequence in batch.decodes:
            sequence.num_computed_tokens += 1
        for chunk in batch.chunks:
            chunk.sequence.num_computed_tokens += chunk.num_tokens
        for sequence, token_id in zip(batch.sampled, token_ids, strict=True):
            is_early = sequence.awaits_min_tokens and sequence.grammar is None
            sequence.output_token_ids.append(token_id)
            if token_id in sequence.end_token_ids and not is_early:
                sequence.finish_reason = FinishReason.STOP
            elif len(sequence.output_token_ids) == sequence.params.max_tokens:
                sequence.finish_reason = FinishReason.LENGTH
        prefilled = [sequence for sequence in self.prefilling if sequence.is_prefilled]
        self.running += prefilled
        self.prefilling = self.prefilling[len(prefilled) :]

    def abort(self, request_id: str) -> Sequence | None:
        """Mark a request as aborted; :meth:`release` frees its slot."""
        for sequence in (*self.running, *self.prefilling, *self.waiting):
            if sequence.request.request_id == request_id:
                sequence.finish_reason = FinishReason.ABORT
                return sequence
        return None

    def release(self) -> None:
        """Free the slots of all sequences that have a finish reason; plan the moves that close the gaps."""
        self.waiting = deque(sequence for sequence in self.waiting if sequence.finish_reason is None)
        alive = [sequence for sequence in self.running if sequence.finish_reason is None]
        count = len(alive)
        taken = {sequence.slot for sequence in alive if sequence.slot < count}
        gaps = [slot for slot in range(count) if slot not in taken]
        for sequence in alive:
            if sequence.slot >= count:
                self._move(sequence, gaps.pop(0))
        self.running = sorted(alive, key=lambda sequence: sequence.slot)
        self.prefilling = [sequence for sequence in self.prefilling if sequence.finish_reason is None]
        for slot, sequence in enumerate(self.prefilling, start=count):
            if sequence.slot != slot:
                self._move(sequence, slot)

    def _move(self, sequence: Sequence, slot: int) -> None:
        if sequence.num_computed_tokens:
            self._moves.append(Move(sequence.slot, slot, sequence.num_computed_tokens))
        sequence.slot = slot
