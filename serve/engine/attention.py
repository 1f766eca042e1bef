"""The one function that knows about requests: attention of a packed row over the slots of the KV cache.

The model runs on one row ``[1, T]``: a decode token of every running sequence, then chunks of prompts.  Its linear
layers see one matrix; only here is the row taken apart.  Registered through transformers' ``AttentionInterface``,
so the model's own code stays unmodified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.kv_cache import KVCache
from serve.engine.scheduler import Batch
from serve.errors import ModelLoadError

NAME = "trimaran"


@dataclass(frozen=True, slots=True)
class ChunkView:
    """Columns ``begin:end`` of the row are positions ``start:start + end - begin`` of ``slot``."""

    begin: int
    end: int
    slot: int
    start: int
    mask: Tensor | None
    """``[end - begin, start + end - begin]``, True where a key is visible; None: plain causal."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What attention must know of one step; travels through the model as the keyword ``step``."""

    cache: KVCache
    num_decodes: int
    rows: Tensor
    """``[T]``: ``slot * max_len + position`` of each column."""
    decode_len: int
    decode_mask: Tensor | None
    """``[num_decodes, 1, 1, decode_len]``, added to the scores."""
    chunks: tuple[ChunkView, ...]


def make_context(batch: Batch, cache: KVCache, dtype: torch.dtype, device: torch.device) -> StepContext:
    """Lay out a batch: decodes first, then chunks."""
    positions = [sequence.num_computed_tokens for sequence in batch.decodes]
    rows = [sequence.slot * cache.max_len + sequence.num_computed_tokens for sequence in batch.decodes]
    chunks: list[ChunkView] = []
    for chunk in batch.chunks:
        begin, end = len(rows), len(rows) + chunk.num_tokens
        first = chunk.sequence.slot * cache.max_len + chunk.start
        rows += range(first, first + chunk.num_tokens)
        mask = _chunk_mask(chunk.start, chunk.num_tokens, device) if chunk.start else None
        chunks.append(ChunkView(begin, end, chunk.sequence.slot, chunk.start, mask))
    decode_len = max(positions, default=-1) + 1
    return StepContext(
        cache=cache,
        num_decodes=len(positions),
        rows=torch.tensor(rows, device=device),
        decode_len=decode_len,
        decode_mask=_decode_mask(positions, decode_len, dtype, device) if len(positions) > 1 else None,
        chunks=tuple(chunks),
    )


def _chunk_mask(start: int, num_tokens: int, device: torch.device) -> Tensor:
    keys = torch.arange(start + num_tokens, device=device)
    return keys[None, :] <= keys[start:, None]


def _decode_mask(positions: list[int], length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    keys = torch.arange(length, device=device)
    hidden = keys[None, :] > torch.tensor(positions, device=device)[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return mask[:, None, None, :]


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - transformers passes it by this name
    scaling: float | None = None,
    step: StepContext | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write the row's keys and values to their slots, attend, return ``[1, T, num_heads, head_dim]``.

    Args:
        module: The attention layer; its ``layer_idx`` names the cache's layer.
        query: ``[1, num_heads, T, head_dim]``.
        key: ``[1, num_kv_heads, T, head_dim]``.
        value: ``[1, num_kv_heads, T, value_dim]``.
        attention_mask: Unused: the slots say what is visible.
        scaling: Factor of the scores; None is ``head_dim ** -0.5``.
        step: The step's layout.
        options: What transformers passes besides; an option that changes the result is refused.
    """
    if step is None:
        raise RuntimeError("the model did not pass the step on to attention")
    refuse_options(options, step.cache.max_len)
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    key_cache, value_cache = step.cache.layer(int(module.layer_idx), keys, values)  # pyright: ignore[reportArgumentType]
    key_cache.flatten(0, 1).index_copy_(0, step.rows, keys)
    value_cache.flatten(0, 1).index_copy_(0, step.rows, values)
    parts = [_attend_chunk(query, key_cache, value_cache, chunk, scaling) for chunk in step.chunks]
    if step.num_decodes:
        parts.insert(0, _attend_decodes(query, key_cache, value_cache, step, scaling))
    row = parts[0] if len(parts) == 1 else torch.cat(parts)
    return row.unsqueeze(0), None


def _attend_decodes(query: Tensor, keys: Tensor, values: Tensor, step: StepContext, scaling: float | None) -> Tensor:
    """One query of each sequence over a view of slots ``0..n-1``; query heads of a group become queries."""
    count, num_kv_heads = step.num_decodes, keys.shape[2]
    grouped = query[0, :, :count].transpose(0, 1).reshape(count, num_kv_heads, -1, query.shape[-1])
    visible_keys = keys[:count, : step.decode_len].transpose(1, 2)
    visible_values = values[:count, : step.decode_len].transpose(1, 2)
    out = F.scaled_dot_product_attention(
        grouped, visible_keys, visible_values, attn_mask=step.decode_mask, scale=scaling
    )
    return out.flatten(1, 2)


def _attend_chunk(query: Tensor, keys: Tensor, values: Tensor, chunk: ChunkView, scaling: float | None) -> Tensor:
    """A piece of one prompt over its own slot."""
    length = chunk.start + chunk.end - chunk.begin
    groups = query.shape[1] // keys.shape[2]
    slot_keys = keys[chunk.slot, :length].transpose(0, 1).repeat_interleave(groups, 0)
    slot_values = values[chunk.slot, :length].transpose(0, 1).repeat_interleave(groups, 0)
    out = F.scaled_dot_product_attention(
        query[:, :, chunk.begin : chunk.end],
        slot_keys[None],
        slot_values[None],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scaling,
    )
    return out[0].transpose(0, 1)


def refuse_options(options: dict[str, Any], max_len: int) -> None:
    """Refuse what this function would get silently wrong.

    Raises:
        ModelLoadError: a sliding window shorter than the context, a softcap, attention sinks.
    """
    window = options.get("sliding_window")
    if window is not None and window < max_len:
        raise ModelLoadError(
            f"this model attends through a sliding window of {window} tokens, which the engine does not do yet; "
            f"set SERVE_MAX_MODEL_LEN={window} to serve it exactly within the window"
        )
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise ModelLoadError(f"this model's attention uses {name}, which the engine does not do yet")


def register() -> None:
    """Make :func:`slot_attention` known to transformers; doing it twice is harmless."""
    import transformers  # noqa: PLC0415

    interface: Any = transformers.AttentionInterface
    interface.register(NAME, slot_attention)
