"""Steps on the CPU from a recorded program: a small model spends as long in Python as in its small operators.

Recorded when the engine is first idle, and compared with the model itself on other tokens in batches of other sizes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from serve.engine import builder, gate, peephole, program, rows
from serve.engine.attention import make_context, running
from serve.engine.kv_cache import KVCache
from serve.engine.packed import Inputs, call, forward, inputs_of
from serve.engine.recorder import NotReplayable, Recording, record
from serve.engine.sequence import Batch, Chunk, Sequence
from serve.engine.survey import probe_tokens
from serve.engine.transfer import NOTHING_DRAWN, Drawn
from serve.types import GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)

RECORDED = ((2, 2), (2, 3), (3, 1))
"""Decodes, and tokens of a prompt: 4 or 5 columns and 2 or 3 rows of logits, so that each number changes alone."""
COMPARED = ((1, 0), (3, 6))
"""One row is a case of its own to many operators."""
PROBE_TOKENS = 8

SLOW_STEP_S = 0.5
"""What a record wins is a small part of a large model's step, and making it takes several steps."""


class StepProgram:
    """A model's step."""

    def __init__(self, model: Any, run: Callable[..., Tensor], cache: KVCache) -> None:
        self._model, self._run, self._cache = model, run, cache

    def logits(self, batch: Batch, drawn: Drawn = NOTHING_DRAWN) -> Tensor:
        """As :func:`serve.engine.packed.forward`."""
        return forward(self._model, batch, self._cache, drawn, self._compute)

    def _compute(self, _model: Any, inputs: Inputs) -> Tensor:
        return self._run(inputs[0].shape[1], len(inputs[2]), *inputs)


@torch.inference_mode()
def make(model: Any, cache: KVCache) -> StepProgram | None:
    """Record and compare; None where the model cannot be recorded, with the reason logged.

    Args:
        model: Its attention is :mod:`serve.engine.attention`.
        cache: Of the steps to come; the probes have their own.
    """
    began = time.perf_counter()
    try:
        expected = [forward(model, _batch(model, *sizes), _empty(cache)) for sizes in COMPARED]
        if time.perf_counter() - began > len(COMPARED) * SLOW_STEP_S:
            raise NotReplayable("which take so long that a record would win little")
        graph = builder.build(*(_recorded(model, cache, *sizes) for sizes in RECORDED))
        graph = peephole.simplified(graph, rows.find(model.dtype, model.device))
        run = program.compiled(graph)
        got = [StepProgram(model, run, _empty(cache)).logits(_batch(model, *sizes)) for sizes in COMPARED]
        off_by = max(gate.off_by(a.float(), b.float()) for a, b in zip(expected, got, strict=True))
        if not off_by <= gate.TOLERANCE[model.dtype]:
            raise NotReplayable(f"recorded, they are off by {off_by:.2g} of the logits' spread")
    except Exception as error:
        # A program is text made from what was seen: whatever it raises is a reason to do without it.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.info("Steps: through the model's modules (%s)", reason)
        return None
    logger.info(
        "Steps: recorded in %.2f s, %d operators; off by %.2g of the logits' spread",
        *(time.perf_counter() - began, len(graph.nodes), off_by),
    )
    return StepProgram(model, run, cache)


def _empty(cache: KVCache) -> KVCache:
    """A small one for a probe: what lies in the cache changes the logits."""
    return cache.resized(1 + max(num_decodes for num_decodes, _ in RECORDED + COMPARED), PROBE_TOKENS)


def _recorded(model: Any, cache: KVCache, num_decodes: int, num_prompt_tokens: int) -> Recording:
    batch = _batch(model, num_decodes, num_prompt_tokens)
    with running(make_context(batch, _empty(cache), model.dtype, model.device)):
        return record(model, inputs_of(batch, model.device), lambda *inputs: call(model, inputs))


def _batch(model: Any, num_decodes: int, num_prompt_tokens: int) -> Batch:
    """Decodes at different positions, over keys and values that are zero, and the beginning of a longer prompt."""
    tokens = probe_tokens(model.config.get_text_config().vocab_size, num_decodes + num_prompt_tokens + 1, num_decodes)
    decodes: list[Sequence] = []
    for slot, token_id in enumerate(tokens[:num_decodes]):
        position = 1 + (slot + num_decodes) % (PROBE_TOKENS - 1)
        decodes.append(_sequence(slot, position, [1] * position))
        decodes[-1].output_token_ids.append(token_id)
    prompt = _sequence(num_decodes, 0, tokens[num_decodes:])
    chunks = (Chunk(prompt, 0, num_prompt_tokens),) if num_prompt_tokens else ()
    return Batch((), tuple(decodes), chunks)


def _sequence(slot: int, num_computed_tokens: int, prompt: list[int]) -> Sequence:
    params = SamplingParams(max_tokens=2)
    request = GenerationRequest(request_id=f"probe-{slot}", prompt_token_ids=tuple(prompt), params=params)
    return Sequence(request, slot, num_computed_tokens)
