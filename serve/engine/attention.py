"""The one function that knows about requests: attention of a packed row over the slots of the KV cache.

The model runs on one row ``[1, T]``: a decode token of every running sequence, then chunks of prompts.  Its linear
layers see one matrix; only here is the row taken apart.  Registered through transformers' ``AttentionInterface``,
so the model's own code stays unmodified.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine import blocks, flash, parts, tiles
from serve.engine.blocks import Extras
from serve.engine.kv_cache import KVCache, write
from serve.engine.parts import added
from serve.engine.patterns import Pattern
from serve.engine.scheduler import Batch, Chunk
from serve.engine.transfer import on_device

NAME = "trimaran"

_step: ContextVar[StepContext] = ContextVar("step")
"""The step that this thread is running.  Not a keyword through the model: some families do not pass keywords on."""


@dataclass(frozen=True, slots=True)
class ChunkView:
    """Columns ``begin:end`` of the row over the keys ``first_key:last_key`` of ``slot``."""

    begin: int
    end: int
    slot: int
    first_key: int
    last_key: int
    mask: Tensor | None
    """``[end - begin, last_key - first_key]``, added to the scores; None: plain causal."""


@dataclass(frozen=True, slots=True)
class View:
    """What the layers of one pattern see of a step."""

    first_key: int
    """Of all decodes together."""
    last_key: int
    decode_mask: Tensor | None
    """``[num_decodes, 1, 1, last_key - first_key]``, added to the scores; None: every key is seen."""
    chunks: tuple[ChunkView, ...]


AnyView = View | parts.BlockView | flash.SpanView | tiles.TileView
"""Of torch's own attention on a GPU, of the CPU's, of FlashAttention's, and of the compiled kernel's."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What attention must know of one step."""

    cache: KVCache
    num_decodes: int
    rows: dict[int, Tensor]
    """Where each column is written (:meth:`KVCache.rows`); the compiled kernel does that itself."""
    views: dict[Pattern, AnyView]


def make_context(batch: Batch, cache: KVCache, dtype: torch.dtype, device: torch.device) -> StepContext:
    """Lay out a batch: decodes first, then chunks."""
    positions = [sequence.num_computed_tokens for sequence in batch.decodes]
    slots, columns = [sequence.slot for sequence in batch.decodes], [*positions]
    for slot, position in zip(slots, positions, strict=True):
        cache.extend(slot, position, position + 1)
    for chunk in batch.chunks:
        end = chunk.start + chunk.num_tokens
        cache.extend(chunk.sequence.slot, chunk.start, end)
        slots += [chunk.sequence.slot] * chunk.num_tokens
        columns += range(chunk.start, end)
    views: dict[Pattern, AnyView] = {}
    for pattern in set(cache.patterns):
        if cache.varlen is not None:
            views[pattern] = flash.span_view(pattern, batch, cache.max_len, device)
        elif cache.kernels is not None:
            views[pattern] = tiles.tile_view(cache.kernels, pattern, positions, batch.chunks)
        elif cache.in_blocks:
            views[pattern] = parts.block_view(pattern, positions, batch.chunks, cache, dtype)
        else:
            views[pattern] = _view(pattern, positions, batch.chunks, dtype, device)
    rows = {} if cache.kernels is not None else cache.rows(slots, columns)
    return StepContext(cache, len(positions), rows, views)


def _view(
    pattern: Pattern, positions: list[int], chunks: tuple[Chunk, ...], dtype: torch.dtype, device: torch.device
) -> View:
    first_keys = [pattern.first(position) for position in positions]
    first_key, last_key = min(first_keys, default=0), max(positions, default=-1) + 1
    mask = None
    if len(set(positions)) > 1:
        keys = torch.arange(first_key, last_key, device=device)
        mask = added(pattern.visible(on_device(positions, device), keys), dtype)[:, None, None, :]
    begin, views = len(positions), list[ChunkView]()
    for chunk in chunks:
        end = begin + chunk.num_tokens
        views.append(_chunk_view(pattern, chunk, begin, end, dtype, device))
        begin = end
    return View(first_key, last_key, mask, tuple(views))


def _chunk_view(
    pattern: Pattern, chunk: Chunk, begin: int, end: int, dtype: torch.dtype, device: torch.device
) -> ChunkView:
    first_key, last_key = pattern.first(chunk.start), chunk.start + chunk.num_tokens
    # The first query sees itself alone and the last one sees the first key: a triangle, which needs no mask.
    if first_key == chunk.start and pattern.first(last_key - 1) == first_key:
        return ChunkView(begin, end, chunk.sequence.slot, first_key, last_key, None)
    queries = torch.arange(chunk.start, last_key, device=device)
    keys = torch.arange(first_key, last_key, device=device)
    mask = added(pattern.visible(queries, keys), dtype)
    return ChunkView(begin, end, chunk.sequence.slot, first_key, last_key, mask)


@contextmanager
def running(step: StepContext) -> Generator[None]:
    """Attention of this thread belongs to ``step``."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - transformers passes it by this name
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Write the row's keys and values to their slots, attend, return ``[1, T, num_heads, value_dim]``.

    Args:
        module: The attention layer; its ``layer_idx`` names the cache's layer.
        query: ``[1, num_heads, T, head_dim]``.
        key: ``[1, num_kv_heads, T, head_dim]``.
        value: ``[1, num_kv_heads, T, value_dim]``.
        attention_mask: Unused: the slots and the layer's pattern say what is seen.
        scaling: Factor of the scores; None is ``head_dim ** -0.5``.
        softcap: Bound of the scores, which pass through ``softcap * tanh(score / softcap)``.
        s_aux: ``[num_heads]``: scores of an attention sink, which takes weight and gives no value.
        _options: What ``serve.engine.gate`` has found to change nothing.
    """
    step = _step.get()
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
    key_cache, value_cache = step.cache.layer(layer, keys, values)
    view = step.views[step.cache.patterns[layer]]
    if isinstance(view, tiles.TileView):
        extras = Extras(scaling, softcap, s_aux)
        return tiles.attend(query, key, value, key_cache, value_cache, view, extras).unsqueeze(0), None
    write(key_cache, step.rows, keys)
    write(value_cache, step.rows, values)
    if isinstance(view, flash.SpanView):
        return _attend_spans(query[0].transpose(0, 1), key_cache, value_cache, step, view, scaling), None
    extras = Extras(scaling, softcap, s_aux)
    if isinstance(view, parts.BlockView):
        return blocks.attend(query, key_cache, value_cache, view, extras).unsqueeze(0), None
    outs = [_attend_chunk(query, key_cache, value_cache, chunk, extras) for chunk in view.chunks]
    if step.num_decodes:
        outs.insert(0, _attend_decodes(query, key_cache, value_cache, step.num_decodes, view, extras))
    row = outs[0] if len(outs) == 1 else torch.cat(outs)
    return row.unsqueeze(0), None


def _attend_spans(
    query: Tensor, keys: Tensor, values: Tensor, step: StepContext, view: flash.SpanView, scaling: float | None
) -> Tensor:
    """Decodes in one call and chunks in another, since the kernel is faster where each sequence has one query."""
    count, varlen = step.num_decodes, step.cache.varlen
    split = ((view.decodes, query[:count]), (view.chunks, query[count:]))
    parts = [flash.attend(varlen, part, keys, values, spans, scaling) for spans, part in split if varlen and spans]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)


def _attend_decodes(query: Tensor, keys: Tensor, values: Tensor, count: int, view: View, extras: Extras) -> Tensor:
    """One query of each sequence over a view of slots ``0..n-1``; query heads of a group become queries."""
    num_kv_heads = keys.shape[2]
    grouped = query[0, :, :count].transpose(0, 1).reshape(count, num_kv_heads, -1, query.shape[-1])
    seen_keys = keys[:count, view.first_key : view.last_key].transpose(1, 2)
    seen_values = values[:count, view.first_key : view.last_key].transpose(1, 2)
    out = _attend(grouped, seen_keys, seen_values, view.decode_mask, False, extras)
    return out.flatten(1, 2)


def _attend_chunk(query: Tensor, keys: Tensor, values: Tensor, chunk: ChunkView, extras: Extras) -> Tensor:
    """A piece of one prompt over its own slot."""
    slot_keys = keys[chunk.slot, chunk.first_key : chunk.last_key].transpose(0, 1)[None]
    slot_values = values[chunk.slot, chunk.first_key : chunk.last_key].transpose(0, 1)[None]
    queries = query[:, :, chunk.begin : chunk.end]
    num_heads, num_kv_heads = query.shape[1], keys.shape[2]
    groups = num_heads // num_kv_heads
    if groups == 1 or chunk.mask is None or extras.softcap is not None or extras.sinks is not None:
        slot_keys, slot_values = slot_keys.repeat_interleave(groups, 1), slot_values.repeat_interleave(groups, 1)
        out = _attend(queries, slot_keys, slot_values, chunk.mask, chunk.mask is None, extras)
    else:
        # Query heads of a group become queries: a long prompt's keys are neither copied nor read once for each head.
        grouped = queries.reshape(1, num_kv_heads, -1, queries.shape[-1])
        out = _attend(grouped, slot_keys, slot_values, chunk.mask.repeat(groups, 1), False, extras)
    return out.reshape(num_heads, -1, out.shape[-1]).transpose(0, 1)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool, extras: Extras
) -> Tensor:
    """``[batch, heads, num_queries, value_dim]``; fused where the scores need nothing special."""
    if extras.softcap is None and extras.sinks is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, scale=extras.scaling
        )
    scaling = query.shape[-1] ** -0.5 if extras.scaling is None else extras.scaling
    scores = (query @ keys.transpose(-1, -2)).float() * scaling
    if extras.softcap is not None:
        scores = (scores / extras.softcap).tanh_() * extras.softcap
    if is_causal:
        mask = added(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_(), scores.dtype)
    if mask is not None:
        scores = scores + mask
    if extras.sinks is None:
        weights = scores.softmax(-1)
    else:
        # Heads and queries of a decode batch are [num_kv_heads, heads of a group], of a chunk [num_heads, queries].
        heads = query.shape[1]
        sinks = extras.sinks.float().view(1, heads, -1, 1).expand(len(query), heads, query.shape[2], 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values


def register() -> None:
    """Make :func:`slot_attention` known to transformers; doing it twice is harmless."""
    import transformers  # noqa: PLC0415

    interface: Any = transformers.AttentionInterface
    interface.register(NAME, slot_attention)
