"""One step of a model whose attention is :mod:`serve.engine.attention`: the whole batch as one row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from serve.engine.attention import make_context, running
from serve.engine.kv_cache import KVCache
from serve.engine.scheduler import Batch
from serve.engine.transfer import NOTHING_DRAWN, Drawn, last_known, on_device


def forward(model: Any, batch: Batch, cache: KVCache, drawn: Drawn = NOTHING_DRAWN) -> Tensor:
    """Logits ``[n, vocab_size]``: a row of each sampled sequence, then those that predict asked prompt tokens.

    One row of no meaning when there is none of either.  ``drawn`` holds what is pending.
    """
    cache.move(batch.moves)
    token_ids = [last_known(sequence) for sequence in batch.decodes]
    positions = [sequence.num_computed_tokens for sequence in batch.decodes]
    wanted = list(range(len(batch.decodes)))
    for_prompts: list[int] = []
    for chunk in batch.chunks:
        token_ids += chunk.sequence.prompt_token_ids[chunk.start : chunk.start + chunk.num_tokens]
        positions += range(chunk.start, chunk.start + chunk.num_tokens)
        if chunk.completes_prompt:
            wanted.append(len(token_ids) - 1)
        if chunk.sequence.params.prompt_logprobs is not None:
            begin = len(token_ids) - chunk.num_tokens
            for_prompts += range(begin, begin + len(chunk.predicted))
    wanted += for_prompts
    device = model.device
    input_ids = on_device(token_ids, device)
    drawn.fill(input_ids, batch.decodes)
    with running(make_context(batch, cache, model.dtype, device)):
        return model(
            input_ids=input_ids[None],
            position_ids=on_device([positions], device),
            use_cache=False,
            # A step of partial prompts needs no logits, but every model takes one row.
            logits_to_keep=on_device(wanted or [0], device),
        ).logits[0]
