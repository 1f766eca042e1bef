"""Attention over a cache in blocks, on the CPU: matrix products of many sequences and heads at once.

torch's fused kernel for CPUs multiplies one head of one sequence at a time.  Here a product takes a block of all
decodes together, which lies in one piece: anything else torch would copy for oneDNN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.kv_cache import Room
from serve.engine.parts import ROWS, BlockView, Part, Piece


@dataclass(frozen=True, slots=True)
class Extras:
    """What a layer does to its scores besides a softmax."""

    scaling: float | None
    softcap: float | None
    sinks: Tensor | None


def attend(query: Tensor, keys: Tensor, values: Tensor, view: BlockView, extras: Extras) -> Tensor:
    """``[T, num_heads, value_dim]``.

    Args:
        query: ``[1, num_heads, T, head_dim]``.
        keys: A layer's cache, ``[num_blocks, num_slots, num_kv_heads, block_len, head_dim]``.
        values: Likewise.
        view: Which of them each part sees.
        extras: Of the layer.
    """
    outs: list[Tensor] = []
    layer = _Layer(keys, values, view.room)
    for part in view.parts:
        if part.is_fused:
            outs.append(_fused(query, keys, values, part, extras))
            continue
        rows = _queries(query, part, keys.shape[2], extras.scaling)
        out = _products(rows, layer, part, extras)
        if part.num_rows:
            out = out.view(query.shape[1], part.num_rows, -1)[:, : part.end - part.begin].transpose(0, 1)
        outs.append(out.view(part.end - part.begin, query.shape[1], -1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


NOTHING_COPIED = (-1, (0, 0), torch.empty(0))


class _Layer:
    """A layer's keys and values as matrices."""

    def __init__(self, keys: Tensor, values: Tensor, room: Room) -> None:
        self._tensors, self._room = (keys, values), room
        self._copied: dict[tuple[int, int], tuple[int, Piece, Tensor]] = {}

    def matrices(self, which: int, part: Part) -> Iterator[Tensor]:
        """Of each piece the keys (0) or values (1), ``[num_slots * num_kv_heads, keys, dim]``; valid until the next."""
        for index, piece in enumerate(part.pieces):
            slot, copied, matrix = self._copied.get((which, index), NOTHING_COPIED)
            is_there = (slot, copied) == (part.first_slot, piece)
            yield matrix if is_there else self._matrix(which, part, index)

    def _matrix(self, which: int, part: Part, index: int) -> Tensor:
        block, count = piece = part.pieces[index]
        found = self._tensors[which][block : block + count, part.first_slot : part.last_slot]
        if count == 1:
            return found[0].flatten(0, 1)
        found = found.permute(1, 2, 0, 3, 4)
        # The next rows of the same prompt see it too; of decodes one copy after the other takes the same memory.
        is_kept = part.num_rows == ROWS
        place = (which, index, *found.shape) if is_kept else found.shape
        copy = self._room.get(place)
        if copy is None:
            copy = self._room[place] = found.new_empty(found.shape)
        matrix = copy.copy_(found).flatten(0, 1).flatten(1, 2)
        if is_kept:
            self._copied[which, index] = part.first_slot, piece, matrix
        return matrix


def _queries(query: Tensor, part: Part, num_kv_heads: int, scaling: float | None) -> Tensor:
    """``[num_slots * num_kv_heads, rows, head_dim]``: query heads of a group become rows; scores need no factor."""
    head_dim = query.shape[3]
    factor: float = head_dim**-0.5 if scaling is None else scaling
    found = query[0, :, part.begin : part.end] * factor
    if not part.num_rows:
        return found.transpose(0, 1).reshape(-1, query.shape[1] // num_kv_heads, head_dim)
    if part.num_rows > found.shape[1]:
        found = F.pad(found, (0, 0, 0, part.num_rows - found.shape[1]))
    return found.reshape(num_kv_heads, -1, head_dim)


def _products(rows: Tensor, layer: _Layer, part: Part, extras: Extras) -> Tensor:
    pieces = [rows.bmm(keys.transpose(1, 2)) for keys in layer.matrices(0, part)]
    sizes = [piece.shape[2] for piece in pieces]
    scores = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
    if extras.softcap is not None:
        scores = (scores.float() / extras.softcap).tanh_().mul_(extras.softcap)
    if part.mask is not None:
        shape = (-1, part.num_rows) if part.num_rows else (part.last_slot - part.first_slot, -1)
        scores.view(*shape, scores.shape[2])[:, :, part.mask_start :].add_(part.mask)
    if extras.sinks is not None:
        scores = torch.cat((scores, _sinks(extras.sinks, scores, part.num_rows)), 2)
        sizes.append(1)
    # In float32 inside, and rounded once: torch's softmax of bfloat16 is that on the CPU.
    weights = scores.softmax(2).to(rows.dtype)
    split = (weights,) if len(sizes) == 1 else torch.split(weights, sizes, 2)
    shares = _weighted(split, layer.matrices(1, part))
    first = next(shares)
    if len(pieces) == 1:
        return first
    total = first.float()
    for share in shares:
        total.add_(share)
    return total.to(rows.dtype)


def _weighted(weights: tuple[Tensor, ...], matrices: Iterator[Tensor]) -> Iterator[Tensor]:
    # Sinks have a weight and no value: there may be one more of the first.
    return (weight.bmm(values) for values, weight in zip(matrices, weights, strict=False))


def _sinks(sinks: Tensor, scores: Tensor, num_rows: int) -> Tensor:
    """A score of each row, in the order of :func:`_queries`."""
    batch, rows, _ = scores.shape
    if num_rows:
        return sinks.to(scores.dtype)[:, None].expand(-1, num_rows).reshape(batch, rows, 1)
    return sinks.to(scores.dtype).view(1, -1, rows).expand(batch * rows // len(sinks), -1, -1).reshape(batch, rows, 1)


def _fused(query: Tensor, keys: Tensor, values: Tensor, part: Part, extras: Extras) -> Tensor:
    """By torch's own kernel, over a copy of the keys where they are more than a block."""
    block, count = part.pieces[0]
    begin = part.first_key - block * keys.shape[3]
    slots, seen = part.last_slot - part.first_slot, slice(begin, begin + part.last_key - part.first_key)
    found = (each[block : block + count, part.first_slot : part.last_slot] for each in (keys, values))
    pair = [each.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, seen] for each in found]
    num_kv_heads, num_rows, mask = keys.shape[2], part.end - part.begin, part.mask
    rows = query[0, :, part.begin : part.end]
    if part.num_rows:
        mask = None if mask is None else mask.repeat(query.shape[1] // num_kv_heads, 1)
        grouped = rows.reshape(1, num_kv_heads, -1, rows.shape[2])
    else:
        mask = None if mask is None else mask[:, None]
        grouped = rows.transpose(0, 1).reshape(slots, num_kv_heads, -1, rows.shape[2])
    out = F.scaled_dot_product_attention(grouped, *pair, attn_mask=mask, scale=extras.scaling)
    if part.num_rows:
        return out.reshape(query.shape[1], num_rows, -1).transpose(0, 1)
    return out.reshape(num_rows, query.shape[1], -1)
