"""Who owns which slot of the KV cache, and what computed tokens lie in the slots that nobody owns.  Torch-free.

A sequence that left leaves its keys and values behind until its slot is needed.  A new prompt of the same scope takes
over the longest prefix it shares with any slot, in place or as a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve.engine.sequence import Move, Sequence
from serve.types import FinishReason

MIN_SHARED_TOKENS = 16
"""A shorter prefix is computed again: every chat begins alike, and a copy costs too."""
BLOCK = 256


def shared_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that both begin with."""
    limit, at = min(len(a), len(b)), 0
    while at < limit and a[at : at + BLOCK] == b[at : at + BLOCK]:
        at += BLOCK
    while at < limit and a[at] == b[at]:
        at += 1
    return min(at, limit)


@dataclass(slots=True)
class _Slot:
    owner: Sequence | None = None
    token_ids: tuple[int, ...] = ()
    """What a sequence that left had computed here; nothing while somebody owns the slot."""
    scope: str = ""
    used_at: int = 0


class SlotTable:
    """The slots, and the moves within the cache that follow from what was decided about them.

    The table shows the cache as it will be once the moves are carried out, in order, before the next step.

    Args:
        num_slots: Of the cache.
        keeps_prefixes: Whether a slot's content outlives its sequence.
    """

    def __init__(self, num_slots: int, keeps_prefixes: bool) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._keeps_prefixes = keeps_prefixes
        self._moves: list[Move] = []
        self._clock = 0

    def moves(self) -> tuple[Move, ...]:
        """What the cache has to move since the last call."""
        moves, self._moves = tuple(self._moves), []
        return moves

    @property
    def has_room(self) -> bool:
        """Whether some slot has no owner."""
        return any(slot.owner is None for slot in self._slots)

    def shared(self, sequence: Sequence) -> tuple[int, int]:
        """The slot that shares the longest prefix with a prompt, and how long that is; ``(-1, 0)``: none worth it.

        One token of a prompt is always left to compute, since its logits are needed.
        """
        best, length = -1, MIN_SHARED_TOKENS - 1
        if not self._keeps_prefixes or sequence.params.prompt_logprobs is not None:
            return -1, 0
        prompt = sequence.prompt_token_ids
        for index, slot in enumerate(self._slots):
            if len(prompt) - 1 <= length:
                break
            if (slot.owner.scope if slot.owner else slot.scope) == sequence.scope:
                token_ids = slot.owner.computed_token_ids if slot.owner else slot.token_ids
                found = min(shared_length(prompt, token_ids), len(prompt) - 1)
                if found > length:
                    best, length = index, found
        return (best, length) if best >= 0 else (-1, 0)

    def take(self, sequence: Sequence) -> None:
        """Give a sequence a slot, and the longest prefix of its prompt that is there."""
        source, length = self.shared(sequence)
        is_whole = source >= 0 and self._slots[source].owner is None and len(self._slots[source].token_ids) == length
        # What only begins alike stays for its own continuation, if another slot can be had.
        target = source if is_whole else self._spare()
        if source not in {-1, target}:
            self._moves.append(Move(source, target, length))
        sequence.num_computed_tokens = sequence.num_cached_tokens = length
        self._own(target, sequence)

    def leave(self, sequence: Sequence) -> None:
        """A sequence ended: what it computed stays until the slot is needed."""
        slot = self._slots[sequence.slot]
        slot.owner = None
        sequence.num_computed_tokens = sequence.num_settled_tokens
        if sequence.finish_reason is FinishReason.ERROR:
            slot.token_ids = ()  # its keys and values may be NaN
        elif self._keeps_prefixes and sequence.num_computed_tokens >= MIN_SHARED_TOKENS:
            self._clock += 1
            slot.token_ids, slot.scope, slot.used_at = sequence.computed_token_ids, sequence.scope, self._clock

    def relocate(self, sequence: Sequence, target: int) -> None:
        """Bring a sequence to a slot; who or what is there goes to where it comes from."""
        source, there = sequence.slot, self._slots[target]
        if source == target:
            return
        num_tokens = there.owner.num_computed_tokens if there.owner else len(there.token_ids)
        if length := max(sequence.num_computed_tokens, num_tokens):
            self._moves.append(Move(source, target, length, is_swap=num_tokens > 0))
        self._slots[source] = there
        if there.owner is not None:
            there.owner.slot = source
        self._own(target, sequence)

    def _spare(self) -> int:
        """The slot without owner that is missed least: an empty one, else the one that was left longest ago."""
        free = (index for index, slot in enumerate(self._slots) if slot.owner is None)
        return min(free, key=lambda index: (self._slots[index].used_at, index))

    def _own(self, index: int, sequence: Sequence) -> None:
        self._slots[index] = _Slot(sequence)
        sequence.slot = index
