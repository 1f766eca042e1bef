"""Attention over a cache in blocks by the compiled kernel: which columns of a step see which keys, planned once.

A tile is one decode, or some columns of a prompt, which read the same keys.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine import compiled
from serve.engine.blocks import Extras
from serve.engine.compiled import INT, POINTER, Library
from serve.engine.kv_cache import BLOCK_LEN, KVCache
from serve.engine.patterns import Pattern
from serve.engine.sequence import Chunk

logger = logging.getLogger(__name__)

COLUMNS = 32
"""Of a prompt in one tile, at most."""
DIM_STEP = 32
"""Numbers of bfloat16 in a register."""
TRIAL = ((3, 140), (130, 150))
"""First and last key that each of two columns sees: of two blocks, and of the second alone."""


class Step(ctypes.Structure):
    """``Step`` of ``kernels/attention.c``."""

    _fields_ = (
        *((name, POINTER) for name in ("query", "key", "value")),
        *((f"{name}_{axis}", INT) for name in ("query", "key", "value") for axis in ("head", "column")),
        *((name, POINTER) for name in ("keys", "values", "out", "sinks", "tiles", "spans")),
        *((name, INT) for name in ("num_tiles", "num_slots", "num_heads", "num_kv_heads", "dim", "value_dim")),
        ("scratch", POINTER),
        ("scratch_size", INT),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class TileView:
    """What the layers of one pattern see of a step."""

    library: Library
    tiles: Tensor
    """``[num_tiles, 3]``, int32: a tile's first column, the one after its last, and its slot."""
    spans: Tensor
    """``[num_columns, 2]``, int32: the first key that a column sees, and the last, which is its own."""
    most_columns: int
    """Of a tile."""


def choose(cache: KVCache, dtype: torch.dtype, device: torch.device) -> Library | None:
    """The kernel's library, if every layer of the model can use it and it proves right on their shapes.

    Args:
        cache: Knows the shapes of all layers.
        dtype: Of keys and values.
        device: Where they are.
    """
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return None
    if any(shape[1] % DIM_STEP for pair in cache.shapes for shape in pair):
        return None
    if any(key[0] != value[0] for key, value in cache.shapes):
        return None
    library = compiled.library()
    if library is None:
        return None
    off_by = max(_trial(library, *key, value[1]) for key, value in cache.shapes)
    if not off_by <= compiled.TOLERANCE:
        logger.info("Attention: torch's own (the compiled kernel is off by %.2g on this model's shapes)", off_by)
        return None
    return library


def tile_view(library: Library, pattern: Pattern, positions: Sequence[int], chunks: Sequence[Chunk]) -> TileView:
    """Of a step whose decodes come first, in slots ``0..n-1``."""
    tiles = [(slot, slot + 1, slot) for slot in range(len(positions))]
    columns, most = [*positions], min(1, len(positions))
    for chunk in chunks:
        begin, end = len(columns), len(columns) + chunk.num_tokens
        tiles += [(at, min(at + COLUMNS, end), chunk.sequence.slot) for at in range(begin, end, COLUMNS)]
        columns += range(chunk.start, chunk.start + chunk.num_tokens)
        most = max(most, min(COLUMNS, chunk.num_tokens))
    spans = [(pattern.first(position), position) for position in columns]
    return TileView(library, _int32(tiles), _int32(spans), most)


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, view: TileView, extras: Extras
) -> Tensor:
    """Write the columns' keys and values to the cache, attend, return ``[T, num_heads, value_dim]``.

    Args:
        query: ``[1, num_heads, T, head_dim]``.
        key: ``[1, num_kv_heads, T, head_dim]``.
        value: ``[1, num_kv_heads, T, value_dim]``.
        keys: A layer's cache, ``[num_blocks, num_slots, num_kv_heads, block_len, head_dim]``.
        values: Likewise.
        view: Which of them each column sees.
        extras: Of the layer.
    """
    _, num_heads, num_columns, dim = query.shape
    _, num_kv_heads, _, value_dim = value.shape
    sinks = None if extras.sinks is None else extras.sinks.float().contiguous()
    num_blocks, num_slots = keys.shape[:2]
    # The kernel itself checks nothing: it would read and write whatever lies beyond.
    if not (
        query.dtype is key.dtype is value.dtype is torch.bfloat16
        and key.shape == (1, num_kv_heads, num_columns, dim)
        and value.shape[2] == view.spans.shape[0] == num_columns
        and keys.shape == (num_blocks, num_slots, num_kv_heads, BLOCK_LEN, dim)
        and values.shape == (num_blocks, num_slots, num_kv_heads, BLOCK_LEN, value_dim)
        and num_heads % num_kv_heads == 0
        and (sinks is None or sinks.shape == (num_heads,))
    ):
        raise ValueError(_misfit(query=query, key=key, value=value, keys=keys, values=values, sinks=sinks))
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = query.new_empty(num_columns, num_heads, value_dim)
    num_threads, library = torch.get_num_threads(), view.library
    rows = view.most_columns * (num_heads // num_kv_heads)
    size: int = library.attend_scratch_size(rows, dim, value_dim)
    scratch = library.scratch(size * num_threads)
    step = Step(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr()),
        *(*query.stride()[1:3], *key.stride()[1:3], *value.stride()[1:3]),
        *(keys.data_ptr(), values.data_ptr(), out.data_ptr(), None if sinks is None else sinks.data_ptr()),
        *(view.tiles.data_ptr(), view.spans.data_ptr(), view.tiles.shape[0], num_slots),
        *(num_heads, num_kv_heads, dim, value_dim, scratch.data_ptr(), size),
        *(dim**-0.5 if extras.scaling is None else extras.scaling, extras.softcap or 0.0),
    )
    library.attend(ctypes.byref(step), library.parallel, num_threads)
    return out


def _misfit(**tensors: Tensor | None) -> str:
    known = (f"{name} {each.dtype} {tuple(each.shape)}" for name, each in tensors.items() if each is not None)
    return f"attention is given tensors that do not fit each other or the step: {', '.join(known)}"


def _int32(rows: list[tuple[int, ...]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def _trial(library: Library, num_kv_heads: int, dim: int, value_dim: int) -> float:
    """The largest difference of two columns from arithmetic in float32."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    keys, values = (made(2, 1, num_kv_heads, BLOCK_LEN, size) for size in (dim, value_dim))
    query, key, value = (
        made(1, 2 * num_kv_heads, 2, dim),
        made(1, num_kv_heads, 2, dim),
        made(1, num_kv_heads, 2, value_dim),
    )
    view = TileView(library, _int32([(0, 2, 0)]), _int32([*TRIAL]), 2)
    got = attend(query, key, value, keys, values, view, Extras(None, None, None))
    worst = 0.0
    for column, (first, last) in enumerate(TRIAL):
        seen = (each[:, 0].transpose(0, 1).flatten(1, 2)[:, first : last + 1].float() for each in (keys, values))
        seen_keys, seen_values = (each.repeat_interleave(2, 0) for each in seen)
        scores = (seen_keys @ query[0, :, column, :, None].float()) * dim**-0.5
        expected = (scores.softmax(1) * seen_values).sum(1)
        worst = max(worst, float((got[column].float() - expected).abs().amax()))
    return worst
