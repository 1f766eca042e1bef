"""Attention over a cache in blocks, on the CPU: matrix products of many sequences and heads at once.

torch's fused kernel for CPUs multiplies one head of one sequence at a time.  Here a product takes a block of all
decodes together, which lies in one piece: anything else torch would copy for oneDNN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.kv_cache import Room
from serve.engine.parts import EVERYTHING, FUSED_BLOCKS, ROWS, BlockView, Index, Part, Piece


class Extras(NamedTuple):
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
    layer = _Layer(keys, values, view.room)
    outs: list[Tensor] = []
    for part in view.parts:
        is_prompt = part.num_rows > 0
        columns = query if len(view.parts) == 1 else query[:, :, part.begin : part.end]
        if part.fused:
            out = _fused(columns, layer, part, keys.shape[2], extras)
        else:
            out = _products(_queries(columns, part, keys.shape[2], extras.scaling), layer, part, extras)
        if is_prompt:
            out = out.view(query.shape[1], part.num_rows, -1)[:, : part.end - part.begin].transpose(0, 1)
        outs.append(out if is_prompt else out.view(part.end - part.begin, query.shape[1], -1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


NOTHING_COPIED = (-1, (0, 0), torch.empty(0))


class _Layer:
    """A layer's keys and values as matrices."""

    def __init__(self, keys: Tensor, values: Tensor, room: Room) -> None:
        self._tensors, self._room = (keys, values), room
        self._copied: dict[tuple[int, int], tuple[int, Piece, Tensor]] = {}
        self._shared: dict[int, tuple[tuple[Index, ...], Tensor]] = {}

    def matrices(self, which: int, part: Part) -> Iterator[Tensor]:
        """Of each piece the keys (0) or values (1), ``[num_slots * num_kv_heads, keys, dim]``; valid until the next."""
        last = len(part.pieces) - 1
        for index, piece in enumerate(part.pieces):
            slot, copied, matrix = self._copied.get((which, index), NOTHING_COPIED)
            if (slot, copied) != (part.first_slot, piece):
                matrix = self._matrix(which, part, index)
            yield matrix if index < last or part.seen is EVERYTHING else matrix[:, part.seen]

    def seen(self, which: int, part: Part) -> Tensor:
        """``[num_slots, num_kv_heads, keys, dim]`` of ``part.fused``."""
        tensor = self._tensors[which]
        if len(part.fused) == 1:
            found = tensor[part.fused[0]]
        elif len(part.fused) <= FUSED_BLOCKS:
            found = torch.cat([tensor[index] for index in part.fused], 2)
        else:
            indices, found = self._shared.get(which, ((), tensor))
            if indices is not part.fused:
                found = self._concatenated(which, [tensor[index] for index in part.fused])
                self._shared[which] = part.fused, found
        return found if part.seen is EVERYTHING else found[:, :, part.seen]

    def _concatenated(self, which: int, views: list[Tensor]) -> Tensor:
        num_slots, num_heads, _, dim = views[0].shape
        sizes = [view.shape[2] for view in views]
        place = which, num_slots, num_heads, dim
        room = self._room.get(place)
        if room is None or room.shape[2] < sum(sizes):
            room = self._room[place] = views[0].new_empty(num_slots, num_heads, 2 * sum(sizes), dim)
        found = room[:, :, : sum(sizes)]
        for target, view in zip(torch.split(found, sizes, 2), views, strict=True):
            target.copy_(view)
        return found

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
    found = query * factor
    if not part.num_rows:
        return found.transpose(1, 2).reshape(query.shape[2] * num_kv_heads, -1, head_dim)
    if part.num_rows > query.shape[2]:
        found = F.pad(found, (0, 0, 0, part.num_rows - query.shape[2]))
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


def _fused(query: Tensor, layer: _Layer, part: Part, num_kv_heads: int, extras: Extras) -> Tensor:
    """By torch's own kernel, over a copy of the keys where they are more than a block."""
    count, head_dim, mask = part.last_slot - part.first_slot, query.shape[3], part.mask
    if part.num_rows:
        grouped = query.reshape(1, num_kv_heads, -1, head_dim)
        mask = None if mask is None else mask.repeat(query.shape[1] // num_kv_heads, 1)
    else:
        grouped = query.transpose(1, 2).reshape(count, num_kv_heads, -1, head_dim)
        mask = None if mask is None else mask[:, None]
    pair = layer.seen(0, part), layer.seen(1, part)
    return F.scaled_dot_product_attention(grouped, *pair, attn_mask=mask, scale=extras.scaling).contiguous()
