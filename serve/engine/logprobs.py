"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from torch import Tensor

from serve.engine.transfer import to_host
from serve.types import MIN_LOGPROB, TokenLogprob

ROWS_AT_ONCE = 64
"""Bounds the memory of float32 copies of the logits."""


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: Seq[int]) -> Callable[[], list[TokenLogprob]]:
    """For each row its token's log-probability beside the ``num_top`` best; the result waits for the device.

    Args:
        logits: ``[n, vocab_size]``.
        token_ids: ``[n]``, on the same device.
        num_top: For each row.
    """
    parts: list[Callable[[], list[TokenLogprob]]] = []
    for begin in range(0, len(token_ids), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        parts.append(_few(logits[rows].float(), token_ids[rows], num_top[rows]))
    return lambda: [found for part in parts for found in part()]


def _few(logits: Tensor, token_ids: Tensor, num_top: Seq[int]) -> Callable[[], list[TokenLogprob]]:
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, token_ids[:, None]) - total
    width = min(max(num_top), logits.shape[1])
    values, top_ids = logits.topk(width, dim=-1)
    columns = to_host(token_ids, own.flatten(), values - total, top_ids)
    return lambda: [
        _one(token_id, logprob, list(zip(ids[:count], best[:count], strict=True)))
        for token_id, logprob, best, ids, count in zip(*columns(), num_top, strict=True)
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
