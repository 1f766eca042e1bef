"""Decode steps on the CPU from a recorded program: a small model spends as long in Python as in its small operators.

Recorded once, when a model is loaded, and compared with the model itself on other tokens and another number of rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from serve.engine import builder, gate, peephole, program
from serve.engine.attention import make_context, running
from serve.engine.kv_cache import KVCache
from serve.engine.packed import call, inputs_of
from serve.engine.recorder import NotReplayable, Recording, record
from serve.engine.sequence import Batch, Sequence
from serve.engine.survey import probe_tokens
from serve.engine.transfer import NOTHING_DRAWN, Drawn
from serve.types import GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)

RECORDED_ROWS = (2, 3)
COMPARED_ROWS = (1, 5)
"""One row is a case of its own to many operators."""
PROBE_TOKENS = 8


class DecodeProgram:
    """A model's decode step."""

    def __init__(self, model: Any, run: Callable[..., Tensor], cache: KVCache) -> None:
        self._model, self._run, self._cache = model, run, cache

    def logits(self, batch: Batch, drawn: Drawn = NOTHING_DRAWN) -> Tensor:
        """Logits ``[num_decodes, vocab_size]`` of a step without prompts.  ``drawn`` holds what is pending."""
        self._cache.move(batch.moves)
        inputs = inputs_of(batch, self._model.device, drawn)
        with running(make_context(batch, self._cache, self._model.dtype, self._model.device)):
            return self._run(len(batch.decodes), *inputs)[0]


def make(model: Any, cache: KVCache) -> DecodeProgram | None:
    """Record and compare; None where the model cannot be recorded, with the reason logged.

    Args:
        model: Its attention is :mod:`serve.engine.attention`.
        cache: Of the steps to come; the probe has one of its own.
    """
    probe = cache.resized(max(RECORDED_ROWS + COMPARED_ROWS), PROBE_TOKENS)
    try:
        graph = builder.build(*(_recorded(model, probe, rows) for rows in RECORDED_ROWS))
        graph = peephole.simplified(graph)
        run = program.compiled(graph)
        off_by = max(_off_by(model, DecodeProgram(model, run, probe), probe, rows) for rows in COMPARED_ROWS)
        if not off_by <= gate.TOLERANCE[model.dtype]:
            raise NotReplayable(f"recorded, they are off by {off_by:.2g} of the logits' spread")
    except Exception as error:
        # A program is text made from what was seen: whatever it raises is a reason to do without it.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.info("Decode steps: through the model's modules (%s)", reason)
        return None
    logger.info("Decode steps: recorded, %d operators; off by %.2g of the logits' spread", len(graph.nodes), off_by)
    return DecodeProgram(model, run, cache)


def _recorded(model: Any, cache: KVCache, rows: int) -> Recording:
    batch = _batch(model, rows)
    with running(make_context(batch, cache, model.dtype, model.device)):
        return record(model, inputs_of(batch, model.device), lambda *inputs: call(model, inputs))


def _off_by(model: Any, found: DecodeProgram, cache: KVCache, rows: int) -> float:
    batch = _batch(model, rows)
    with running(make_context(batch, cache, model.dtype, model.device)):
        expected = call(model, inputs_of(batch, model.device))[0]
    return gate.off_by(expected.float(), found.logits(batch).float())


def _batch(model: Any, rows: int) -> Batch:
    """Decodes at different positions, over keys and values that are zero."""
    tokens = probe_tokens(model.config.get_text_config().vocab_size, rows, 5 * rows)
    decodes: list[Sequence] = []
    for slot, token_id in enumerate(tokens):
        position = 1 + (slot + rows) % (PROBE_TOKENS - 1)
        request = GenerationRequest(
            request_id=f"probe-{slot}", prompt_token_ids=(1,) * position, params=SamplingParams(max_tokens=2)
        )
        decodes.append(Sequence(request, slot, position, output_token_ids=[token_id]))
    return Batch((), tuple(decodes), ())
