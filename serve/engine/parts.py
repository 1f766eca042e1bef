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
FUSED_BLOCKS = 3
"""Of all decodes of a part: so few torch's own kernel attends faster."""
PART_COST, CALL_COST = 12, 5
"""Of a part of a step, and of a piece of it; one block of one sequence is 1.  A few µs on an AMD EPYC of 2022."""
ROWS = 64
"""Of a prompt in one product: with more, hidden keys and large scores cost more than is won."""

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
    first_key: int
    last_key: int
    """What any of them sees."""
    pieces: tuple[Piece, ...]
    num_rows: int
    """Of a prompt with its padding; 0: decodes."""
    mask: Tensor | None
    """Added to the scores from key ``mask_start`` on, counted from the first block; None: every key is seen.

    ``[num_slots, 1, keys]`` of decodes, ``[num_rows, keys]`` of a prompt.
    """
    mask_start: int
    is_fused: bool
    """By torch's own kernel; the mask is then that of the keys ``first_key:last_key`` alone."""


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

    def segments(self, positions: Sequence[int]) -> Sequence[Piece]:
        size, first = self._size, self._pattern.first
        return segments(tuple((first(position) // size, position // size + 1) for position in positions))

    def decodes(self, begin: int, positions: Sequence[int]) -> Part:
        firsts = [self._pattern.first(position) for position in positions]
        first_key, last_key, count = min(firsts), max(positions) + 1, len(positions)
        first_block, last_block = first_key // self._size, (last_key - 1) // self._size + 1
        is_short = count * (last_block - first_block) <= FUSED_BLOCKS
        if self._always_fused or (is_short and not self._never_fused):
            mask = self._mask(positions, range(first_key, last_key)) if count > 1 else None
            mask, start, pieces, is_fused = mask, 0, ((first_block, last_block - first_block),), True
        else:
            base, is_fused = first_block * self._size, False
            start = 0 if max(firsts) > base else _aligned(min(positions) + 1 - base)
            mask = self._mask(positions, range(base + start, last_block * self._size))
            most = min(MOST_BLOCKS, COPIED // count) if count <= FEW_SLOTS else 1
            pieces = tuple(_pieces(first_block, last_block, most))
        mask = None if mask is None else mask[:, None]
        end = begin + count
        return Part(begin, end, begin, end, first_key, last_key, pieces, 0, mask, start, is_fused)

    def prompt(self, begin: int, chunk: Chunk) -> Iterator[Part]:
        for first in range(0, chunk.num_tokens, ROWS):
            num_tokens = min(ROWS, chunk.num_tokens - first)
            yield self._rows(begin + first, chunk.sequence.slot, chunk.start + first, num_tokens)

    def _rows(self, begin: int, slot: int, position: int, count: int) -> Part:
        positions, num_rows = range(position, position + count), padded(count)
        first_key, last_key = self._pattern.first(position), position + count
        first_block, last_block = first_key // self._size, (last_key - 1) // self._size + 1
        is_fused = self._always_fused or (last_block - first_block == 1 and not self._never_fused)
        if is_fused:
            mask, start = self._mask(positions, range(first_key, last_key)), 0
            pieces, num_rows = ((first_block, last_block - first_block),), count
        else:
            base = first_block * self._size
            start = 0 if self._pattern.first(last_key - 1) > base else _aligned(position + 1 - base)
            mask = self._mask(positions, range(base + start, last_block * self._size))
            mask = None if mask is None else F.pad(mask, (0, 0, 0, num_rows - count))
            pieces = tuple(_pieces(first_block, last_block, MOST_BLOCKS))
        ends = begin + count, slot, slot + 1
        return Part(begin, *ends, first_key, last_key, pieces, num_rows, mask, start, is_fused)

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


def _pieces(first: int, last: int, most: int) -> Iterator[Piece]:
    """Powers of two, the large ones first."""
    count = 1 << (max(1, most).bit_length() - 1)
    while first < last:
        while count > last - first:
            count //= 2
        yield first, count
        first += count
