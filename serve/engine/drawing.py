"""Drawing a token: one random point for each row, and where it lies among the row's weights; with a seed, a race.

A row's result depends on its own logits and numbers alone, never on its neighbours or on how equal logits are sorted.
A race costs a random number for each token of the vocabulary, so only rows with a seed run one.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.transfer import on_device

BLOCK = 64
POINT_BITS = 50
"""Fewer than a float64 holds: a point times a sum is then less than the sum."""
WIDTHS = (128, 2048)
"""A nucleus nearly always lies within so many tokens; only when it does not is the whole vocabulary sorted."""

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
CLOCK_BITS = 53


def race_of(weights: Tensor, bases: Tensor) -> Tensor:
    """For each row the token that wins a race of exponential clocks: ``[n]`` from ``[n, vocab_size]`` weights.

    Each token has a clock of its own, drawn from ``bases`` (``[n, 1]``, see :func:`race_base`) and its id; a token of
    twice the weight runs twice as fast.  Where a point among running sums would fall on another of thousands of
    unlikely tokens when the logits are rounded otherwise, as they are in another batch, here the winner changes only
    when two tokens are as good as level.
    """
    if weights.device.type == "cpu":  # one row's numbers stay in the cache: half the time of all rows at once
        return torch.cat([_race(weights[row : row + 1], bases[row : row + 1]) for row in range(len(weights))])
    return _race(weights, bases)


def _race(weights: Tensor, bases: Tensor) -> Tensor:
    ids = torch.arange(1, weights.shape[1] + 1, device=weights.device)
    bits = _mixed(bases + ids * _signed(GOLDEN))
    clocks = _shifted(bits, 64 - CLOCK_BITS).double().add_(0.5).mul_(2.0**-CLOCK_BITS).log_().neg_()
    return clocks.div_(weights).argmin(-1)


def race_base(seed: int, step: int) -> int:
    """Where the clocks of one step of a seeded row begin, as a signed 64-bit number."""
    return _signed(_mix((_mix((seed + GOLDEN) % WORD) + step * GOLDEN) % WORD))


def _mix(value: int) -> int:
    """The finish of SplitMix64."""
    value = (value ^ (value >> 30)) * FACTORS[0] % WORD
    value = (value ^ (value >> 27)) * FACTORS[1] % WORD
    return value ^ (value >> 31)


def _mixed(values: Tensor) -> Tensor:
    """:func:`_mix` of each element; int64 multiplies modulo 2^64 as well."""
    values = (values ^ _shifted(values, 30)) * _signed(FACTORS[0])
    values = (values ^ _shifted(values, 27)) * _signed(FACTORS[1])
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    return (values >> by) & (2 ** (64 - by) - 1)


def _signed(value: int) -> int:
    return value - WORD if value >= WORD // 2 else value


@dataclass(frozen=True, slots=True)
class Trim:
    """What rows keep of their distributions; one number for each row.

    ``top_k`` is 0 to keep all.  ``top_p``, 1.0 to keep all, is of what ``top_k`` keeps.  ``min_p``, 0.0 to keep all, is
    relative to the most likely token.
    """

    top_k: Seq[int]
    top_p: Seq[float]
    min_p: Seq[float]


def weights_of(scaled: Tensor, trim: Trim, *, waits: bool) -> Tensor:
    """Probabilities up to a factor for each row, 0 for what is cut off.

    Args:
        scaled: ``[n, vocab_size]``, logits divided by temperature, float32.
        trim: What is cut off.  Tokens that are as likely as the last one kept are kept too.
        waits: Whether to look at results on the way, which waits for the device.
    """
    best = scaled.amax(-1, keepdim=True)
    weights = (scaled - best).exp_()
    cutoff = None
    if any(trim.min_p):
        cutoff = best + on_device(trim.min_p, scaled.device, torch.float32)[:, None].log()
    if any(trim.top_k) or any(p < 1.0 for p in trim.top_p):
        total = weights.sum(-1, keepdim=True, dtype=torch.float64)
        found = _cutoffs(scaled, best, total, trim, waits=waits)
        cutoff = found if cutoff is None else torch.maximum(cutoff, found)
    return weights if cutoff is None else weights.masked_fill_(scaled < cutoff, 0.0)


def _cutoffs(scaled: Tensor, best: Tensor, total: Tensor, trim: Trim, *, waits: bool) -> Tensor:
    """The smallest logit of each row that ``top_k`` and ``top_p`` keep; narrow looks first.

    Whether a look was wide enough is certain beforehand for rows with a ``top_k``.  For the others the device must tell
    or, where nobody waits for it, the whole vocabulary is sorted.
    """
    vocab_size, device = scaled.shape[1], scaled.device
    found = torch.full_like(best, float("-inf"))
    top_k = on_device([min(k or vocab_size, vocab_size) for k in trim.top_k], device)[:, None]
    top_p = on_device(trim.top_p, device, torch.float32)[:, None]
    # For each row still to be done how wide a look must be to be certainly wide enough.
    needed = {
        row: k if 0 < k < vocab_size else vocab_size
        for row, (k, p) in enumerate(zip(trim.top_k, trim.top_p, strict=True))
        if 0 < k < vocab_size or p < 1.0
    }
    for width in (*(width for width in WIDTHS if width < vocab_size), vocab_size):
        rows = [row for row, certain in needed.items() if waits or certain <= width]
        if not rows:
            continue
        at = on_device(rows, device)
        cut, is_known = _cut(
            scaled.index_select(0, at),
            best.index_select(0, at),
            total.index_select(0, at),
            top_k.index_select(0, at),
            top_p.index_select(0, at),
            width,
        )
        found.index_copy_(0, at, cut)
        known = cast("list[bool]", cast("Any", is_known.flatten()).tolist()) if waits else [True] * len(rows)
        for row, is_done in zip(rows, known, strict=True):
            if is_done:
                del needed[row]
    return found


def _cut(
    scaled: Tensor, best: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The smallest logit kept, and whether the largest ``width`` logits suffice to know it."""
    is_all = width == scaled.shape[1]
    values = (scaled.sort(dim=-1, descending=True) if is_all else scaled.topk(width, dim=-1)).values
    mass = (values - best).exp_().cumsum(dim=-1, dtype=torch.float64)
    last = (top_k - 1).clamp(max=width - 1)
    is_limited = top_k < scaled.shape[1]
    enough = top_p * torch.where(is_limited, mass.gather(1, last), total)
    reaching = torch.searchsorted(mass, enough)
    # Rounding must not cut what top_p = 1 keeps.
    reaching = torch.where(top_p < 1.0, reaching, torch.where(is_limited, last, width))
    is_known = (torch.where(is_limited, top_k, 0) <= width) & ((reaching < width) | is_all)
    return values.gather(1, torch.minimum(reaching, last).clamp(max=width - 1)), is_known


def pick(weights: Tensor, points: Tensor) -> Tensor:
    """For each row the token at its point: ``[n]`` from ``[n, vocab_size]`` weights and ``[n, 1]`` float64 points.

    In two levels, since a running sum over the whole vocabulary is the slowest part of drawing.
    """
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, BLOCK)
    block, rest = _locate(blocks.sum(-1), points)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK)).squeeze(1)
    return (block * BLOCK + _locate(inside, rest)[0]).squeeze(1)


def _locate(weights: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The column at each point, never one of weight 0, and where in that column the point lies."""
    ends = weights.cumsum(dim=-1, dtype=torch.float64)
    target = points * ends[:, -1:]
    column = torch.searchsorted(ends, target, right=True).clamp_(max=weights.shape[1] - 1)
    own = weights.gather(1, column).double()
    rest = (target - ends.gather(1, column) + own) / own
    return column, rest.clamp_(0.0, 1.0 - 2.0**-POINT_BITS)
