"""Decides what runs in each step: admission, chunked prefill, slots, when a sequence ends.

Torch-free, thread-free: the worker owns it, and its rules are tested in milliseconds.

Slots: running sequences own slots ``0..n-1`` (a decode batch is then one view of the KV cache, without a copy),
prefilling ones any of the others.  When a sequence leaves, the last running one moves into its slot; a prompt that is
complete moves to slot ``n``.  :class:`~serve.engine.slots.SlotTable` says what of the cache follows.

A step may be scheduled while the tokens of the one before are still on the device.  Then every running sequence is
taken to go on, but for those whose number of tokens is reached: they are ``ending``, and keep a slot behind the running
ones until their last token is read.  Whoever turns out to have ended earlier is computed once more for nothing, and its
slot is given away at once: steps and moves of the cache run on the device in the order in which they were launched.
"""

from __future__ import annotations

from serve.engine.budget import PrefillBudget, share
from serve.engine.sequence import Batch, Chunk, Move, Sequence
from serve.engine.slots import SlotTable, shared_length
from serve.engine.turns import FairQueue
from serve.types import FinishReason, GenerationRequest

MIN_AWAITED_TOKENS = 64
"""For so many tokens a prompt waits until another one has computed them."""

__all__ = ["Batch", "Chunk", "Move", "Scheduler", "Sequence"]


class Scheduler:
    """Waiting, prefilling and running sequences over ``num_slots`` slots of the KV cache.

    Args:
        num_slots: Of the KV cache.
        prefill_chunk_tokens: Prompt tokens of a step in which nothing else runs.
        eos_token_ids: End every sequence that does not ignore them.
        keeps_prefixes: Whether a slot's content outlives its sequence, so that others may go on from it.
        gap_s: As :class:`~serve.engine.budget.PrefillBudget` has it.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        prefill_chunk_tokens: int,
        eos_token_ids: frozenset[int],
        keeps_prefixes: bool = False,
        gap_s: float = 0.2,
    ) -> None:
        self.num_slots = num_slots
        self.budget = PrefillBudget(prefill_chunk_tokens, gap_s)
        self._eos_token_ids = eos_token_ids
        self._slots = SlotTable(num_slots, keeps_prefixes)
        self._keeps_prefixes = keeps_prefixes
        self.waiting = FairQueue()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.ending: list[Sequence] = []

    def add(self, request: GenerationRequest) -> Sequence:
        """Queue a request behind the others of its scope."""
        params = request.params
        end_token_ids = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | self._eos_token_ids
        sequence = Sequence(request, end_token_ids=end_token_ids)
        self.waiting.add(sequence)
        return sequence

    @property
    def has_work(self) -> bool:
        """Whether the next step would do anything."""
        return bool(self.prefilling or self.running or (self.waiting and self._slots.has_room))

    @property
    def num_with_slots(self) -> int:
        """Sequences that have a slot."""
        return len(self.prefilling) + len(self.running) + len(self.ending)

    def schedule(self) -> Batch:
        """Choose the next step's work: all running sequences, and prompts up to the token budget."""
        while self.waiting and self._slots.has_room:
            sequence = self.waiting.pop(self._is_ready)
            if sequence is None:
                break
            self._slots.take(sequence)
            self.prefilling.append(sequence)
        chunks = share(self.prefilling, self.budget.tokens(bool(self.running))) if self.prefilling else ()
        return Batch(self._slots.moves(), tuple(self.running), chunks)

    def _is_ready(self, sequence: Sequence) -> bool:
        """Not while another prompt is being computed that begins alike: its keys and values are worth the wait."""
        if not self._keeps_prefixes or sequence.params.prompt_logprobs is not None:
            return True
        soon = max(
            (
                shared_length(sequence.prompt_token_ids, other.prompt_token_ids)
                for other in self.prefilling
                if other.scope == sequence.scope
            ),
            default=0,
        )
        soon = min(soon, len(sequence.prompt_token_ids) - 1)
        return soon < MIN_AWAITED_TOKENS or soon - self._slots.shared(sequence)[1] < MIN_AWAITED_TOKENS

    def complete(self, batch: Batch, token_ids: list[int]) -> None:
        """Record a step that was read at once: :meth:`advance` and :meth:`record`."""
        self.advance(batch)
        self.record(batch, token_ids)

    def advance(self, batch: Batch) -> None:
        """A step was launched: what it computes counts from here on, and its tokens are pending."""
        for sequence in batch.decodes:
            sequence.num_computed_tokens += 1
        for chunk in batch.chunks:
            chunk.sequence.num_computed_tokens += chunk.num_tokens
        for sequence in batch.sampled:
            sequence.num_pending_tokens += 1
        if batch.chunks:
            done = [sequence for sequence in self.prefilling if not sequence.num_prompt_tokens_left]
            self.prefilling = [sequence for sequence in self.prefilling if sequence.num_prompt_tokens_left]
            for sequence in done:
                self._slots.relocate(sequence, len(self.running))
                self.running.append(sequence)

    def record(self, batch: Batch, token_ids: list[int]) -> tuple[int, ...]:
        """Take the tokens of a launched step, one for each of ``batch.sampled``; see which sequences end by themselves.

        Finished sequences keep their slot until :meth:`release`, so that a stop string can still end others.

        Returns:
            The rows that count: those of sequences that had not ended before.
        """
        counting: list[int] = []
        for row, (sequence, token_id) in enumerate(zip(batch.sampled, token_ids, strict=True)):
            sequence.num_pending_tokens -= 1
            if sequence.finish_reason is not None:
                continue
            counting.append(row)
            is_early = len(sequence.output_token_ids) < sequence.params.min_tokens and sequence.grammar is None
            sequence.output_token_ids.append(token_id)
            if token_id in sequence.end_token_ids and not is_early:
                sequence.finish_reason = FinishReason.STOP
            elif len(sequence.output_token_ids) == sequence.params.max_tokens:
                sequence.finish_reason = FinishReason.LENGTH
        return tuple(counting)

    def abort(self, request_id: str) -> Sequence | None:
        """Mark a request as aborted; :meth:`release` frees its slot."""
        for sequence in (*self.running, *self.ending, *self.prefilling, *self.waiting):
            if sequence.request.request_id == request_id:
                sequence.finish_reason = FinishReason.ABORT
                return sequence
        return None

    def release(self) -> None:
        """Free the slots of all sequences that have a finish reason; plan the moves that close the gaps."""
        if self.waiting:
            self.waiting.drop_ended()
        owners = (*self.running, *self.ending, *self.prefilling)
        ended = [sequence for sequence in owners if sequence.finish_reason is not None]
        if not ended and not any(sequence.is_ending for sequence in self.running):
            return
        for sequence in ended:
            self._slots.leave(sequence)
        self.prefilling = [sequence for sequence in self.prefilling if sequence.finish_reason is None]
        alive = [sequence for sequence in (*self.running, *self.ending) if sequence.finish_reason is None]
        self.ending = [sequence for sequence in alive if sequence.is_ending]
        alive = [sequence for sequence in alive if not sequence.is_ending]
        count = len(alive)
        taken = {sequence.slot for sequence in alive if sequence.slot < count}
        gaps = [slot for slot in range(count) if slot not in taken]
        for sequence in alive:
            if sequence.slot >= count:
                self._slots.relocate(sequence, gaps.pop(0))
        self.running = sorted(alive, key=lambda sequence: sequence.slot)
