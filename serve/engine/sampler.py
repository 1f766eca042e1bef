"""Logits to token ids: each row by its own parameters, in one batch."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from typing import Any, cast

import torch
from torch import Tensor

from serve.engine.base import StepOutput
from serve.engine.drawing import POINT_BITS, pick, seeded_point, weights_of
from serve.engine.logits import LogitChanges
from serve.engine.logprobs import token_logprobs
from serve.engine.scheduler import Sequence


class Sampler:
    """Draws each row at one random point; the point of a row with a seed depends on seed and step alone.

    What a row does not ask for costs it nothing.

    Args:
        device: Where the logits are.
        seed: Of the numbers that rows without a seed share.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        self._shared = random.Random(seed)  # noqa: S311 - no secret depends on it
        self._changes = LogitChanges(device)

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> StepOutput:
        """One token for each row of ``logits`` (``[num_sequences, vocab_size]``)."""
        top, chosen = logits.max(dim=-1)
        is_finite = torch.isfinite(top)
        plain: list[int] = []
        changed: list[int] = []
        for row, sequence in enumerate(sequences):
            (changed if sequence.changes_logits or sequence.awaits_min_tokens else plain).append(row)
        self._draw(logits, sequences, plain, chosen)
        errors: dict[int, Any] = {}
        if changed:
            own = [sequences[row] for row in changed]
            values = logits[changed].float()
            self._changes.apply(values, own)
            own_top, own_chosen = values.max(dim=-1)
            self._draw(values, own, range(len(own)), own_chosen)
            chosen[changed] = own_chosen
            is_finite[changed] &= torch.isfinite(own_top)
            errors = {changed[row]: error for row, error in self._changes.errors.items()}
        drawn = cast("list[int]", cast("Any", chosen).tolist())
        finite = cast("list[bool]", cast("Any", is_finite).tolist())
        ids = [drawn[row] if finite[row] and row not in errors else None for row in range(len(drawn))]
        return StepOutput(ids, errors, self._logprobs(logits, sequences, ids))

    def _logprobs(self, logits: Tensor, sequences: Seq[Sequence], ids: list[int | None]) -> dict[int, Any]:
        asked = [
            (row, token_id, sequence.params.logprobs)
            for row, (sequence, token_id) in enumerate(zip(sequences, ids, strict=True))
            if sequence.params.logprobs is not None and token_id is not None
        ]
        if not asked:
            return {}
        rows, token_ids, num_top = zip(*asked, strict=True)
        return dict(zip(rows, token_logprobs(logits[list(rows)], token_ids, num_top), strict=True))

    def _draw(self, logits: Tensor, sequences: Seq[Sequence], rows: Seq[int], chosen: Tensor) -> None:
        """Write the tokens of those ``rows`` that are not greedy into ``chosen``."""
        drawn = [row for row in rows if not sequences[row].params.is_greedy]
        if not drawn:
            return
        own = [sequences[row] for row in drawn]
        params = [sequence.params for sequence in own]
        vocab_size = logits.shape[1]
        scaled = logits[drawn].float().div_(self._column([p.temperature for p in params]))
        is_trimmed = any(p.top_k or p.top_p < 1.0 for p in params)
        weights = weights_of(
            scaled,
            self._column([min(p.top_k or vocab_size, vocab_size) for p in params], torch.int64) if is_trimmed else None,
            self._column([p.top_p for p in params]) if is_trimmed else None,
            self._column([p.min_p for p in params]) if any(p.min_p for p in params) else None,
        )
        chosen[drawn] = pick(weights, self._column([self._point(sequence) for sequence in own], torch.float64))

    def _point(self, sequence: Sequence) -> float:
        if sequence.params.seed is None:
            return self._shared.getrandbits(POINT_BITS) / 2**POINT_BITS
        return seeded_point(sequence.params.seed, len(sequence.output_token_ids))

    def _column(self, values: Seq[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, device=self._device, dtype=dtype)[:, None]
