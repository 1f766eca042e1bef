"""Attention over sequences of any length on the CPU, with the signature and the demands of torch's CUDA kernel.

Only where :mod:`torch.nn.attention.varlen` says what it takes; the demands are those of FlashAttention-2 in
``flash_api.cpp``, so that metadata which a GPU would refuse fails here too.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

calls: list[tuple[int, int]] = []
"""For each call the number of sequences, and the most queries of one."""


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor,
) -> Tensor:
    """``[T_q, H_q, D]``.  Queries and keys of a sequence are aligned at their ends."""
    num_sequences = len(seqused_k)
    calls.append((num_sequences, max_q))
    for numbers, size in ((cu_seq_q, num_sequences + 1), (cu_seq_k, num_sequences + 1), (seqused_k, num_sequences)):
        assert numbers.dtype == torch.int32
        assert numbers.shape == (size,)
        assert numbers.is_contiguous()
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert key.dim() == 3
    assert key.shape == value.shape
    assert key.shape[2] == query.shape[2]
    assert query.shape[2] % 8 == 0
    assert query.shape[2] <= 256
    assert type(window_size) is tuple  # a list is never equal to (-1, 0), and not causal then
    assert enable_gqa or query.shape[1] == key.shape[1]
    begins, starts, used = cu_seq_q.tolist(), cu_seq_k.tolist(), seqused_k.tolist()
    assert begins[0] == 0
    assert begins[-1] == len(query)
    if max_q == 1:
        assert begins == list(range(num_sequences + 1))
        assert window_size == (-1, -1), "the slower way"
    parts = [
        _one(
            query[begin:end], key[start : start + count], value[start : start + count], max_q, max_k, scale, window_size
        )
        for begin, end, start, count in zip(begins[:-1], begins[1:], starts[:-1], used, strict=True)
    ]
    return torch.cat(parts)


def _one(
    query: Tensor, key: Tensor, value: Tensor, max_q: int, max_k: int, scale: float | None, window: tuple[int, int]
) -> Tensor:
    num_queries, num_keys = len(query), len(key)
    assert 0 < num_queries <= max_q
    assert 0 < num_keys <= max_k
    at = torch.arange(num_queries)[:, None] + num_keys - num_queries
    keys = torch.arange(num_keys)[None, :]
    left, right = window
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    seen &= (left < 0) | (keys >= at - left)
    seen &= (right < 0) | (keys <= at + right)
    groups = query.shape[1] // key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1).repeat_interleave(groups, 0)[None],
        value.transpose(0, 1).repeat_interleave(groups, 0)[None],
        attn_mask=seen,
        scale=scale,
    )[0].transpose(0, 1)


def same_names() -> bool:
    """Whether torch's own function takes every argument by the same name, kind and order."""
    from torch.nn.attention.varlen import varlen_attn

    theirs = inspect.signature(varlen_attn).parameters
    ours = inspect.signature(varlen).parameters
    common = [name for name in theirs if name in ours]
    return common == list(ours) and all(theirs[name].kind == ours[name].kind for name in ours)
