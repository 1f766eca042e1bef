"""One step of a model whose attention is :mod:`serve.engine.attention`: the whole batch as one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from serve.engine.attention import make_context, running
from serve.engine.kv_cache import KVCache
from serve.engine.scheduler import Batch
from serve.engine.transfer import NOTHING_DRAWN, Drawn, last_known, on_device

Inputs = tuple[Tensor, Tensor, Tensor]
"""Token ids and positions, ``[1, T]`` each, and the columns whose logits are wanted, ``[n]``."""


def forward(
    model: Any,
    batch: Batch,
    cache: KVCache,
    drawn: Drawn = NOTHING_DRAWN,
    compute: Callable[[Any, Inputs], Tensor] | None = None,
) -> Tensor:
    """Logits ``[n, vocab_size]``: a row of each sampled sequence, then those that predict asked prompt tokens.

    One row of no meaning when there is none of either.  ``drawn`` holds what is pending.  ``compute`` stands for
    :func:`call`.
    """
    cache.move(batch.moves)
    inputs = inputs_of(batch, model.device, drawn)
    with running(make_context(batch, cache, model.dtype, model.device)):
        return (compute or call)(model, inputs)[0]


def call(model: Any, inputs: Inputs) -> Tensor:
    """The model's logits ``[1, n, vocab_size]``."""
    input_ids, position_ids, wanted = inputs
    return model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=wanted).logits


def inputs_of(batch: Batch, device: torch.device, drawn: Drawn = NOTHING_DRAWN) -> Inputs:
    """What the model is given for a batch.  ``drawn`` holds what is pending."""
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
    input_ids = on_device(token_ids, device)
    drawn.fill(input_ids, batch.decodes)
    # A step of partial prompts needs no logits, but every model takes one row.
    return input_ids[None], on_device([positions], device), on_device(wanted or [0], device)
