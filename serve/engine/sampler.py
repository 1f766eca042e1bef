"""Logits to token ids: each row by its own parameters, in one batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from serve.engine.base import StepOutput
from serve.engine.drawing import POINT_BITS, Trim, pick, race_base, race_of, weights_of
from serve.engine.logits import LogitChanges
from serve.engine.logprobs import token_logprobs
from serve.engine.sequence import Sequence
from serve.engine.transfer import NOTHING_DRAWN, Drawn, on_device, to_host
from serve.types import TokenLogprob


class Sampler:
    """Draws each row at one random point; the point of a row with a seed depends on seed and step alone.

    What a row does not ask for costs it nothing.

    Args:
        device: Where the logits are.
        seed: Of the numbers that rows without a seed share.
        waits: Whether drawing may wait for the device, where that is cheaper than not to know.

    ``drawn`` holds the tokens of the last call, on the device.
    """

    def __init__(self, device: torch.device, seed: int, *, waits: bool = True) -> None:
        self.drawn = NOTHING_DRAWN
        self._device = device
        self._waits = waits
        self._shared = random.Random(seed)  # noqa: S311 - no secret depends on it
        self._changes = LogitChanges(device)

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> StepOutput:
        """One token for each row of ``logits`` (``[num_sequences, vocab_size]``)."""
        return self.launch(logits, sequences)()

    def launch(self, logits: Tensor, sequences: Seq[Sequence]) -> Callable[[], StepOutput]:
        """Begin :meth:`sample`; the result waits for the device."""
        top, chosen = logits.max(dim=-1)
        is_finite = torch.isfinite(top)
        plain: list[int] = []
        changed: list[int] = []
        for row, sequence in enumerate(sequences):
            (changed if sequence.changes_logits or sequence.awaits_min_tokens else plain).append(row)
        self._draw(logits, sequences, plain, chosen)
        errors: dict[int, Any] = {}
        if changed:
            own, at = [sequences[row] for row in changed], on_device(changed, self._device)
            values = logits.index_select(0, at).float()
            self._changes.apply(values, own, self.drawn)
            own_top, own_chosen = values.max(dim=-1)
            self._draw(values, own, range(len(own)), own_chosen)
            chosen.index_copy_(0, at, own_chosen)
            is_finite.index_copy_(0, at, is_finite.index_select(0, at) & torch.isfinite(own_top))
            errors = {changed[row]: error for row, error in self._changes.errors.items()}
        # What is drawn from no numbers may lie outside the vocabulary, and the next step may read it unseen.
        chosen = torch.where(is_finite, chosen, 0)
        self.drawn = Drawn(chosen, sequences)
        columns = to_host(chosen, is_finite)
        logprobs = self._logprobs(logits, sequences, chosen)

        def read() -> StepOutput:
            token_ids, finite = columns()
            ids = [token_ids[row] if finite[row] and row not in errors else None for row in range(len(token_ids))]
            return StepOutput(ids, errors, {row: each for row, each in logprobs().items() if ids[row] is not None})

        return read

    def _logprobs(
        self, logits: Tensor, sequences: Seq[Sequence], chosen: Tensor
    ) -> Callable[[], dict[int, TokenLogprob]]:
        asked = {
            row: sequence.params.logprobs
            for row, sequence in enumerate(sequences)
            if sequence.params.logprobs is not None
        }
        if not asked:
            return dict[int, TokenLogprob]
        at = on_device(list(asked), self._device)
        found = token_logprobs(logits.index_select(0, at), chosen.index_select(0, at), list(asked.values()))
        return lambda: dict(zip(asked, found(), strict=True))

    def _draw(self, logits: Tensor, sequences: Seq[Sequence], rows: Seq[int], chosen: Tensor) -> None:
        """Write the tokens of those ``rows`` that are not greedy into ``chosen``."""
        drawn = [row for row in rows if not sequences[row].params.is_greedy]
        self._draw_some(logits, sequences, [row for row in drawn if sequences[row].params.seed is None], chosen)
        self._draw_some(logits, sequences, [row for row in drawn if sequences[row].params.seed is not None], chosen)

    def _draw_some(self, logits: Tensor, sequences: Seq[Sequence], drawn: Seq[int], chosen: Tensor) -> None:
        """All of them with a seed, or all without."""
        if not drawn:
            return
        own = [sequences[row] for row in drawn]
        params = [sequence.params for sequence in own]
        at = on_device(drawn, self._device)
        scaled = logits.index_select(0, at).float().div_(self._column([p.temperature for p in params]))
        trim = Trim([p.top_k for p in params], [p.top_p for p in params], [p.min_p for p in params])
        weights = weights_of(scaled, trim, waits=self._waits)
        chosen.index_copy_(0, at, self._won(weights, own))

    def _won(self, weights: Tensor, own: Seq[Sequence]) -> Tensor:
        seeds = [sequence.params.seed for sequence in own]
        if seeds[0] is None:
            points = [self._shared.getrandbits(POINT_BITS) / 2**POINT_BITS for _ in own]
            return pick(weights, self._column(points, torch.float64))
        bases = [race_base(seed or 0, each.num_drawn_tokens) for seed, each in zip(seeds, own, strict=True)]
        return race_of(weights, self._column(bases, torch.int64))

    def _column(self, values: Seq[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return on_device(values, self._device, dtype)[:, None]
