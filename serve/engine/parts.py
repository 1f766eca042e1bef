"""How a step's attention is divided into matrix products over the blocks of a cache: planned once, for all layers.

oneDNN compiles code for each shape of a product and keeps it, so shapes are few: blocks are of one length, a prompt's
rows are padded, and where products of single blocks would be too small, 2, 4 or 8 blocks are copied into one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.kv_cache import KVCache, Room
from serve.engine.patterns import Pattern
from serve.engine.sequence import Chunk

MOST_SLOTS = 32
"""In one product."""
FEW_SLOTS, COPIED, MOST_BLOCKS = 4, 16, 8
"""Of so few slots up to 8 blocks are copied into one piece, 16 of all slots together."""
FUSED_BLOCKS = 6
"""Of all decodes of a part: so few torch's own kernel attends faster."""
PART_COST, CALL_COST = 12, 5
"""Of a part of a step, and of a piece of it; one block of one sequence is 1.  A few µs on an AMD EPYC of 2022."""
ROWS, FUSED_ROWS = 64, 128
"""Of a prompt at once, in products and by torch's kernel: with more, hidden keys cost more than is won."""
FEW_ROWS = 16
"""Of a prompt: too few in float32 to pay for a copy of the keys."""

EVERYTHING = slice(None)

Index = tuple[int, slice, slice, slice]
Piece = tuple[int, int]
"""A block, and how many follow each other from there."""


@dataclass(frozen=True, slots=True)
class Part:
    """Queries over the same blocks: one of each of neighbouring slots, or some of one prompt."""

    begin: int
    end: int
    """Columns of the step's row."""
    first_slot: int
    last_slot: int
    pieces: tuple[Piece, ...]
    fused: tuple[Index, ...]
    """Where the keys lie that torch's own kernel attends over, if it does: of a layer's cache, block by block.

    The parts of one prompt may share them, so that they are copied once.
    """
    num_rows: int
    """Of a prompt with its padding; 0: decodes."""
    mask: Tensor | None
    """Added to the scores from key ``mask_start`` on, counted from the first block; None: every key is seen.

    ``[num_slots, 1, keys]`` of decodes, ``[num_rows, keys]`` of a prompt.
    """
    mask_start: int
    seen: slice
    """Of the last piece the keys that are multiplied; of ``fused`` those that are attended over."""


@dataclass(frozen=True, slots=True)
class BlockView:
    """What the layers of one pattern see of a step."""

    parts: tuple[Part, ...]
    room: Room


def block_view(
    pattern: Pattern, positions: Sequence[int], chunks: Sequence[Chunk], cache: KVCache, dtype: torch.dtype
) -> BlockView:
    """Of a step whose decodes come first, in slots ``0..n-1``."""
    plan = _Plan(pattern, cache, dtype)
    parts = [plan.decodes(begin, positions[begin:end]) for begin, end in plan.segments(positions)]
    begin = len(positions)
    for chunk in chunks:
        parts += plan.prompt(begin, chunk)
        begin += chunk.num_tokens
    return BlockView(tuple(parts), cache.room)


class _Plan:
    def __init__(self, pattern: Pattern, cache: KVCache, dtype: torch.dtype) -> None:
        self._pattern, self._size, self._dtype = pattern, cache.block_len, dtype
        self._never_fused = cache.has_extras
        self._always_fused = not cache.has_extras and not has_fast_products(dtype)
        # Products of float32 are MKL's, which reads any part of a block and compiles nothing, but is no faster than
        # torch's kernel where rows are many.
        self._is_exact = dtype == torch.float32
        self._fuses_prompts = self._always_fused or (self._is_exact and not cache.has_extras)

    def segments(self, positions: Sequence[int]) -> Sequence[Piece]:
        size, first = self._size, self._pattern.first
        return segments(tuple((first(position) // size, position // size + 1) for position in positions))

    def decodes(self, begin: int, positions: Sequence[int]) -> Part:
        firsts = [self._pattern.first(position) for position in positions]
        keys, count = range(min(firsts), max(positions) + 1), len(positions)
        blocks, slots = self._blocks(keys), (begin, begin + count)
        if self._is_fused(count * len(blocks) <= FUSED_BLOCKS):
            mask = self._mask(positions, keys) if count > 1 else None
            mask = None if mask is None else mask[:, None]
            return Part(*slots, *slots, (), self._indices(keys, slots), 0, mask, 0, EVERYTHING)
        most = min(MOST_BLOCKS, COPIED // count) if count <= FEW_SLOTS else 1
        pieces = _pieces(blocks, most)
        first, last, seen = self._multiplied(blocks, pieces, keys)
        start = 0 if max(firsts) > first else _aligned(min(positions) + 1 - first)
        mask = self._mask(positions, range(first + start, last))
        return Part(*slots, *slots, pieces, (), 0, None if mask is None else mask[:, None], start, seen)

    def prompt(self, begin: int, chunk: Chunk) -> Iterator[Part]:
        slots, stop = (chunk.sequence.slot, chunk.sequence.slot + 1), chunk.start + chunk.num_tokens
        is_fused = self._always_fused or (self._fuses_prompts and chunk.num_tokens > FEW_ROWS)
        most, first = FUSED_ROWS if is_fused else ROWS, self._pattern.first(chunk.start)
        shared = self._indices(range(first, stop), slots) if is_fused else ()
        for start in range(chunk.start, stop, most):
            positions = range(start, min(start + most, stop))
            columns = begin + start - chunk.start, begin + positions.stop - chunk.start
            keys = range(self._pattern.first(start), positions.stop)
            if shared:
                seen = slice(keys.start - first, keys.stop - first)
                mask = self._mask(positions, keys)
                yield Part(*columns, *slots, (), shared, len(positions), mask, 0, seen)
            else:
                yield self._rows(columns, slots, positions, keys)

    def _rows(self, columns: Piece, slots: Piece, positions: range, keys: range) -> Part:
        blocks = self._blocks(keys)
        if self._is_fused(len(blocks) == 1):
            indices, mask = self._indices(keys, slots), self._mask(positions, keys)
            return Part(*columns, *slots, (), indices, len(positions), mask, 0, EVERYTHING)
        pieces, num_rows = _pieces(blocks, MOST_BLOCKS), padded(len(positions))
        first, last, seen = self._multiplied(blocks, pieces, keys)
        start = 0 if self._pattern.first(positions[-1]) > first else _aligned(positions.start + 1 - first)
        mask = self._mask(positions, range(first + start, last))
        if mask is not None:
            mask = F.pad(mask, (0, 0, 0, num_rows - len(positions)))
        return Part(*columns, *slots, pieces, (), num_rows, mask, start, seen)

    def _multiplied(self, blocks: range, pieces: tuple[Piece, ...], keys: range) -> tuple[int, int, slice]:
        """The first key and the one after the last, and what of the last piece that is."""
        first = blocks.start * self._size
        if not self._is_exact:
            return first, blocks.stop * self._size, EVERYTHING
        return first, keys.stop, slice(keys.stop - pieces[-1][0] * self._size)

    def _is_fused(self, is_cheaper: bool) -> bool:
        return self._always_fused or (is_cheaper and not self._never_fused)

    def _blocks(self, keys: range) -> range:
        return range(keys.start // self._size, (keys.stop - 1) // self._size + 1)

    def _indices(self, keys: range, slots: Piece) -> tuple[Index, ...]:
        size, found = self._size, list[Index]()
        for block in self._blocks(keys):
            tokens = slice(max(0, keys.start - block * size), min(size, keys.stop - block * size))
            found.append((block, slice(*slots), slice(None), tokens))
        return tuple(found)

    def _mask(self, positions: Sequence[int], keys: range) -> Tensor | None:
        if not keys:
            return None
        seen = self._pattern.visible(torch.tensor(positions), torch.arange(keys.start, keys.stop))
        return added(seen, self._dtype)


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """As attention computes with it: torch would make it of a boolean mask once for each layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


@lru_cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether matrix products of a number format are more than loops on this CPU."""
    mkldnn: Any = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(mkldnn._is_mkldnn_fp16_supported())


@lru_cache(maxsize=64)
def segments(spans: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Neighbours that are cheapest together, since a part reads each of its sequences over the blocks of all.

    Args:
        spans: The first block of each sequence and the one after its last.
    """
    best, begins = [0], [0]
    for end in range(1, len(spans) + 1):
        first, last = spans[end - 1]
        costs: list[Piece] = []
        for begin in range(end - 1, max(-1, end - 1 - MOST_SLOTS), -1):
            first, last = min(first, spans[begin][0]), max(last, spans[begin][1])
            costs.append((best[begin] + PART_COST + (last - first) * (CALL_COST + end - begin), begin))
        cost, begin = min(costs)
        best.append(cost)
        begins.append(begin)
    found, end = list[Piece](), len(spans)
    while end:
        found.append((begins[end], end))
        end = begins[end]
    return tuple(reversed(found))


def padded(num_rows: int) -> int:
    """The rows that are computed in place of ``num_rows`` of a prompt."""
    return 8 if num_rows <= 8 else -(-num_rows // 16) * 16


def _aligned(key: int) -> int:
    """Not after ``key``, and where additions need not begin in the middle of a vector."""
    return key // 32 * 32


def _pieces(blocks: range, most: int) -> tuple[Piece, ...]:
    """Powers of two, the large ones first."""
    found, first = list[Piece](), blocks.start
    count = 1 << (most.bit_length() - 1)
    while first < blocks.stop:
        while count > blocks.stop - first:
            count //= 2
        found.append((first, count))
        first += count
    return tuple(found)
