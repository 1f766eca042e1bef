"""How many prompt tokens a step takes, and whose.  Torch-free.

While nobody waits for the next token of an answer a step takes as much as it may.  Else it takes as much as keeps the
step below the gap that streams may have, or within a few times the length of a step without prompts.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from serve.engine.sequence import Batch, Chunk, Sequence

MAX_STRETCH = 3.0
"""A step with prompts may take this many times as long as one without, where that is longer than the gap."""
MIN_TOKENS = 16
"""A step takes at least so many, however slow it is, so that prompts get done."""
MEMORY = 0.8
"""Share of the past in a running mean."""
PROMPT_LOGPROB_TOKENS = 64
"""Of a prompt whose log-probabilities are asked for, at most this many tokens a step: each gives a row of logits."""
OLDEST_SHARE = 4
"""A quarter of a caller's share belongs to the prompt that came first; the rest to those that are done soonest."""


class PrefillBudget:
    """Learns from the steps' lengths how many prompt tokens fit.

    Args:
        most: Tokens of a step in which nothing else runs.
        gap_s: Seconds that a step with prompts may take beside running streams.
    """

    def __init__(self, most: int, gap_s: float) -> None:
        self._most = self._limit = most
        self._gap_s = gap_s
        self._decode_s: float | None = None
        self._token_s: float | None = None

    def tokens(self, is_decoding: bool) -> int:
        """For the next step."""
        if not is_decoding:
            return self._limit
        if self._decode_s is None or self._token_s is None:
            return min(self._limit, max(MIN_TOKENS, self._most // OLDEST_SHARE))
        room_s = max(self._decode_s * MAX_STRETCH, self._gap_s) - self._decode_s
        fitting = self._most if room_s >= self._token_s * self._most else int(room_s / self._token_s)
        return min(self._limit, max(MIN_TOKENS, fitting))

    def learn(self, batch: Batch, seconds: float) -> None:
        """A step took so long."""
        num_tokens = batch.num_prompt_tokens
        if not num_tokens:
            self._decode_s = _mean(self._decode_s, seconds)
        else:
            self._limit = min(self._most, self._limit + self._limit // 16 + 1)
            if num_tokens >= min(MIN_TOKENS, self._most):
                own_s = max(0.0, seconds - (self._decode_s or 0.0) * bool(batch.decodes))
                self._token_s = _mean(self._token_s, own_s / num_tokens)

    def shrink(self) -> bool:
        """A step did not fit into memory: take half; False when it cannot be less.  It grows back step by step."""
        if self._limit <= MIN_TOKENS:
            return False
        self._limit = max(MIN_TOKENS, self._limit // 2)
        return True


def _mean(past: float | None, value: float) -> float:
    return value if past is None else MEMORY * past + (1 - MEMORY) * value


def share(prefilling: Seq[Sequence], budget: int) -> tuple[Chunk, ...]:
    """Divide a step's tokens among prompts (in order of arrival): evenly among callers, nothing left unused."""
    callers: dict[str, list[Sequence]] = {}
    for sequence in prefilling:
        callers.setdefault(sequence.scope, []).append(sequence)
    granted: dict[Sequence, int] = {}
    by_need = sorted(callers.values(), key=lambda own: sum(map(_need, own)))
    for number, own in enumerate(by_need):
        # Who needs less than an even share leaves the rest to the others.
        budget -= _grant(own, min(budget, -(-budget // (len(by_need) - number))), granted)
    return tuple(
        Chunk(sequence, sequence.num_computed_tokens, granted[sequence])
        for sequence in prefilling
        if granted.get(sequence)
    )


def _grant(own: Seq[Sequence], budget: int, granted: dict[Sequence, int]) -> int:
    """Divide one caller's tokens; returns how many were used."""
    left = budget
    first = [(own[0], -(-budget // OLDEST_SHARE))]
    for sequence, most in first + [(each, budget) for each in sorted(own, key=_need)]:
        tokens = min(_need(sequence) - granted.get(sequence, 0), most, left)
        granted[sequence] = granted.get(sequence, 0) + tokens
        left -= tokens
    return budget - left


def _need(sequence: Sequence) -> int:
    """Tokens that it could use in this step."""
    need = sequence.num_prompt_tokens_left
    return need if sequence.params.prompt_logprobs is None else min(need, PROMPT_LOGPROB_TOKENS)
