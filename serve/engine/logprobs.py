"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, cast

import torch
from torch import Tensor

from serve.types import MIN_LOGPROB, TokenLogprob

ROWS_AT_ONCE = 64
"""Bounds the memory of float32 copies of the logits."""


def token_logprobs(logits: Tensor, token_ids: Seq[int], num_top: Seq[int]) -> list[TokenLogprob]:
    """For each row of ``logits`` (``[n, vocab_size]``): its token's log-probability beside the ``num_top`` best."""
    found: list[TokenLogprob] = []
    for begin in range(0, len(token_ids), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        found += _few(logits[rows].float(), token_ids[rows], num_top[rows])
    return found


def _few(logits: Tensor, token_ids: Seq[int], num_top: Seq[int]) -> list[TokenLogprob]:
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]) - total
    width = min(max(num_top), logits.shape[1])
    values, top_ids = logits.topk(width, dim=-1)
    columns = (own.flatten(), values - total, top_ids)
    own_list, value_lists, id_lists = (cast("Any", column).tolist() for column in columns)
    return [
        _one(token_id, logprob, list(zip(ids[:count], best[:count], strict=True)))
        for token_id, logprob, ids, best, count in zip(token_ids, own_list, id_lists, value_lists, num_top, strict=True)
    ]


def _one(token_id: int, logprob: float, top: list[tuple[int, float]]) -> TokenLogprob:
    """Among equals the token itself comes first: in bfloat16 the best logits often tie."""
    if top and logprob >= top[-1][1]:
        if all(other != token_id for other, _ in top):
            top[-1] = (token_id, logprob)
        top.sort(key=lambda entry: (-entry[1], entry[0] != token_id))
    kept = tuple((other, _finite(value)) for other, value in top)
    return TokenLogprob(token_id, _finite(logprob), kept)


def _finite(value: float) -> float:
    return value if value > MIN_LOGPROB else MIN_LOGPROB  # also for NaN, which is above nothing
