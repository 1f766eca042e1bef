"""Logits to token ids: each row by its own parameters, in one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import Any, cast

import torch
from torch import Tensor

from serve.engine.scheduler import Sequence

NEGATIVE_INFINITY = float("-inf")
TRIM_WIDTH = 1024
"""A nucleus nearly always lies within this many tokens; only when it does not is the vocabulary sorted."""


class Sampler:
    """Draws by racing exponential clocks: the token whose ``probability / clock`` is largest wins.

    A row with a seed gets the clocks of its seed and step, one for each token of the vocabulary, so that it draws
    the same alone and in any batch.

    Args:
        device: Where the logits are.
        seed: Of the generator that rows without a seed share.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        self._shared = torch.Generator(device).manual_seed(seed)

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> list[int | None]:
        """One token id for each row of ``logits`` (``[num_sequences, vocab_size]``); None: not finite."""
        top, chosen = logits.max(dim=-1)
        whole: list[int] = []
        trimmed: list[int] = []
        for row, sequence in enumerate(sequences):
            params = sequence.request.params
            if not params.is_greedy:
                (trimmed if params.top_k or params.top_p < 1.0 else whole).append(row)
        if whole:
            chosen[whole] = self._draw_whole(logits[whole].float(), [sequences[row] for row in whole])
        if trimmed:
            chosen[trimmed] = self._draw_trimmed(logits[trimmed].float(), [sequences[row] for row in trimmed])
        token_ids = cast("list[int]", cast("Any", chosen).tolist())
        finite = cast("list[bool]", cast("Any", torch.isfinite(top)).tolist())
        return [token_id if ok else None for token_id, ok in zip(token_ids, finite, strict=True)]

    def _draw_whole(self, logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
        logits = logits / self._temperatures(sequences)
        return self._race(logits, sequences, None, logits.shape[1])

    def _draw_trimmed(self, logits: Tensor, sequences: Seq[Sequence], width: int = TRIM_WIDTH) -> Tensor:
        """Draw from the ``width`` most likely tokens, wider when some row's nucleus does not lie in them."""
        vocab_size = logits.shape[1]
        params = [sequence.request.params for sequence in sequences]
        width = min(vocab_size, max(width, *(p.top_k for p in params)))
        scaled = logits / self._temperatures(sequences)
        kept, token_ids = scaled.topk(width, dim=-1)
        ranks = torch.arange(width, device=self._device)[None, :]
        limits = self._column([p.top_k or vocab_size for p in params])
        kept = kept.masked_fill(ranks >= limits, NEGATIVE_INFINITY)
        has_top_k = self._column([p.top_k for p in params]) > 0
        total = torch.where(has_top_k, kept.logsumexp(-1, keepdim=True), scaled.logsumexp(-1, keepdim=True))
        mass = (kept - total).exp().cumsum(dim=-1)
        top_p = self._column([p.top_p for p in params])
        if width < vocab_size and bool(((mass[:, -1:] < top_p) & ~has_top_k).any()):
            return self._draw_trimmed(logits, sequences, vocab_size)
        before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), dim=-1)
        kept = kept.masked_fill((before >= top_p) & (ranks > 0), NEGATIVE_INFINITY)
        return self._race(kept, sequences, token_ids, vocab_size)

    def _race(self, logits: Tensor, sequences: Seq[Sequence], token_ids: Tensor | None, vocab_size: int) -> Tensor:
        """The winners; ``token_ids`` names the columns of ``logits``, or they are the whole vocabulary."""
        min_p = [sequence.request.params.min_p for sequence in sequences]
        if any(min_p):
            floor = logits.amax(-1, keepdim=True) + self._column([math.log(p) if p else -math.inf for p in min_p])
            logits = logits.masked_fill(logits < floor, NEGATIVE_INFINITY)
        clocks = torch.empty_like(logits).exponential_(generator=self._shared)
        for row, sequence in enumerate(sequences):
            if sequence.request.params.seed is not None:
                own = self._seeded_clocks(sequence, vocab_size)
                clocks[row] = own if token_ids is None else own[token_ids[row]]
        winners = (logits - clocks.log()).argmax(dim=-1, keepdim=True)
        return (winners if token_ids is None else token_ids.gather(1, winners)).squeeze(1)

    def _seeded_clocks(self, sequence: Sequence, vocab_size: int) -> Tensor:
        seed, step = sequence.request.params.seed or 0, len(sequence.output_token_ids)
        # Odd multipliers spread neighbouring seeds and steps over the generator's 63 bits.
        mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % 2**63
        generator = torch.Generator(self._device).manual_seed(mixed)
        return torch.empty(vocab_size, device=self._device).exponential_(generator=generator)

    def _temperatures(self, sequences: Seq[Sequence]) -> Tensor:
        return self._column([sequence.request.params.temperature for sequence in sequences])

    def _column(self, values: Seq[float]) -> Tensor:
        return torch.tensor(values, device=self._device, dtype=torch.float32)[:, None]
