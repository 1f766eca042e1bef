"""Attention over the slots by FlashAttention's kernel for sequences of any length, which torch's CUDA wheels hold.

A sequence's keys are a span of the cache: where it begins and how much of it counts.  So there is no mask to make, no
key to repeat and nothing to read beyond a sequence's own tokens, and every size that changes from step to step is a
number on the device: a decode step can be recorded as a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from serve.engine.kv_cache import KVCache
from serve.engine.patterns import FULL, Kind, Pattern
from serve.engine.sequence import Batch
from serve.engine.transfer import on_device

logger = logging.getLogger(__name__)

Varlen = Callable[..., Tensor]
"""Has the signature of :func:`torch.nn.attention.varlen.varlen_attn`."""

Range = tuple[int, int, int]
"""A slot, and the positions where a sequence's queries begin and end."""

CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8
DTYPES = (torch.float16, torch.bfloat16)
"""What FlashAttention-2 asks for."""
EVERYTHING, CAUSAL = (-1, -1), (-1, 0)
"""Windows.  The last query of a sequence is aligned with its last key."""
TOLERANCE = 0.05
"""Of the probe, whose results are about 1: bfloat16 keeps 8 bits."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Sequences that lie end to end in the queries, and the span of a layer's cache that each of them sees.

    The cache is read as ``[num_slots * max_len, num_kv_heads, head_dim]``.
    """

    begins: Tensor
    """``[n + 1]``, int32: where each sequence's queries begin, and where the last one's end."""
    starts: Tensor
    """``[n + 1]``, int32: the first key of each; the last entry says nothing."""
    used: Tensor
    """``[n]``, int32: how many keys."""
    max_queries: int
    max_keys: int
    """No sequence has more; greater is allowed."""
    window: tuple[int, int]


@dataclass(frozen=True, slots=True)
class SpanView:
    """What the layers of one pattern see of a step."""

    decodes: Spans | None
    chunks: Spans | None


def span_view(pattern: Pattern, batch: Batch, max_len: int, device: torch.device) -> SpanView:
    """Of a step whose decodes come first."""
    decodes = [(each.slot, each.num_computed_tokens, each.num_computed_tokens + 1) for each in batch.decodes]
    chunks = [(chunk.sequence.slot, chunk.start, chunk.start + chunk.num_tokens) for chunk in batch.chunks]
    return SpanView(
        spans(pattern, decodes, max_len, device) if decodes else None,
        spans(pattern, chunks, max_len, device) if chunks else None,
    )


def spans(pattern: Pattern, ranges: Sequence[Range], max_len: int, device: torch.device) -> Spans:
    """Of sequences given by their slots and the positions of their queries."""
    sizes = [end - start for _, start, end in ranges]
    firsts = [pattern.first(start) for _, start, _ in ranges]
    starts = [slot * max_len + first for (slot, _, _), first in zip(ranges, firsts, strict=True)]
    used = [end - first for (_, _, end), first in zip(ranges, firsts, strict=True)]
    # A span that ends at its only query needs no window; with one the kernel takes a slower way.
    window = EVERYTHING if max(sizes) == 1 else (pattern.size - 1, 0) if pattern.kind is Kind.SLIDING else CAUSAL
    begins, first_keys, counts = _on(device, [*accumulate(sizes, initial=0)], [*starts, 0], used)
    return Spans(begins, first_keys, counts, max(sizes), max(used), window)


def _on(device: torch.device, *columns: list[int]) -> tuple[Tensor, ...]:
    """Each list as int32, in one copy to the device."""
    joined = on_device([number for column in columns for number in column], device, torch.int32)
    return torch.split(joined, [len(column) for column in columns])


def attend(varlen: Varlen, query: Tensor, keys: Tensor, values: Tensor, spans: Spans, scaling: float | None) -> Tensor:
    """``[T, num_heads, head_dim]`` of a query of the same shape.

    Args:
        varlen: The kernel.
        query: Of all sequences, end to end.
        keys: A layer's cache, ``[num_slots, max_len, num_kv_heads, head_dim]``.
        values: Likewise.
        spans: Which of them each sequence sees.
        scaling: Factor of the scores; None is ``head_dim ** -0.5``.
    """
    return varlen(
        query,
        keys.flatten(0, 1),
        values.flatten(0, 1),
        spans.begins,
        spans.starts,
        spans.max_queries,
        spans.max_keys,
        scale=scaling,
        window_size=spans.window,
        enable_gqa=True,
        seqused_k=spans.used,
    )


def choose(cache: KVCache, dtype: torch.dtype, device: torch.device) -> Varlen | None:
    """The kernel, if every layer of the model can use it and it proves right here; else None, with the reason logged.

    Args:
        cache: Knows the shapes and patterns of all layers.
        dtype: Of keys and values.
        device: Where they are.
    """
    if device.type != "cuda":
        return None
    reason = unfit(cache, dtype, torch.cuda.get_device_capability(device))
    if reason is None:
        from torch.nn.attention import varlen  # noqa: PLC0415

        varlen_attn: Any = varlen.varlen_attn
        reason = _differs(varlen_attn, cache, dtype, device)
        if reason is None:
            logger.info("Attention: FlashAttention over the slots")
            return varlen_attn
    logger.info("Attention: torch's own (%s)", reason)
    return None


def unfit(cache: KVCache, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why the kernel cannot compute this model's attention; None when it can."""
    if capability < CAPABILITY:
        return f"FlashAttention needs compute capability 8.0, and the GPU has {capability[0]}.{capability[1]}"
    if dtype not in DTYPES:
        return f"FlashAttention does not compute in {dtype}"
    if cache.has_extras:
        return "some layers have softcaps or sinks"
    if any(pattern.kind is Kind.CHUNKED for pattern in cache.patterns):
        return "some layers see chunks"
    for key_shape, value_shape in cache.shapes:
        dim = key_shape[-1]
        if key_shape != value_shape:
            return "keys and values differ in size"
        if dim > MAX_HEAD_DIM or dim % HEAD_DIM_STEP:
            return f"its heads have {dim} dimensions"
    return None


def _differs(varlen: Varlen, cache: KVCache, dtype: torch.dtype, device: torch.device) -> str | None:
    """Try the kernel on made-up keys of this model's shapes; what went wrong, if anything did."""
    try:
        off = max(probe(varlen, shape[0], shape[1], dtype, device) for shape in {key for key, _ in cache.shapes})
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        return f"FlashAttention does not run here: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None if off <= TOLERANCE else f"FlashAttention is off by {off:.2g} here"


def probe(varlen: Varlen, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference of decodes and of chunks, full and sliding, from arithmetic in float32."""
    generator = torch.Generator().manual_seed(0)
    slots, max_len, groups = 3, 40, 2

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    keys, values = made(slots, max_len, num_kv_heads, head_dim), made(slots, max_len, num_kv_heads, head_dim)
    worst = 0.0
    # Slots in another order than sequences; as many queries as keys, fewer, and one.
    for pattern in (FULL, Pattern(Kind.SLIDING, 7)):
        for ranges in ([(2, 0, 9), (0, 30, 37), (1, 5, 6)], [(1, 39, 40), (0, 12, 13)]):
            query = made(sum(end - start for _, start, end in ranges), num_kv_heads * groups, head_dim)
            got = attend(varlen, query, keys, values, spans(pattern, ranges, max_len, device), None)
            expected = _plain(query, keys, values, ranges, pattern)
            worst = max(worst, float((got.float() - expected).abs().amax()))
    return worst


def _plain(query: Tensor, keys: Tensor, values: Tensor, ranges: Sequence[Range], pattern: Pattern) -> Tensor:
    """Attention as it is defined, sequence by sequence, in float32."""
    parts: list[Tensor] = []
    begin, groups = 0, query.shape[1] // keys.shape[2]
    for slot, start, end in ranges:
        own = query[begin : begin + end - start].float().transpose(0, 1)
        own_keys, own_values = (each[slot, :end].float().repeat_interleave(groups, 1) for each in (keys, values))
        scores = own @ own_keys.permute(1, 2, 0) * query.shape[-1] ** -0.5
        seen = pattern.visible(torch.arange(start, end), torch.arange(end)).to(query.device)
        parts.append(
            (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ own_values.transpose(0, 1)).transpose(0, 1)
        )
        begin += end - start
    return torch.cat(parts)
