"""Decode steps as CUDA graphs: recorded once for each batch size, replayed with one call.

Without them a step launches thousands of small kernels, and Python cannot launch them as fast as a GPU runs them.  A
graph is bound to the addresses of its inputs and outputs, so what changes from step to step is written into buffers
that stay where they are.  Prompts run without graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from operator import add
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine import flash, gate, sequence
from serve.engine.attention import StepContext, running
from serve.engine.kv_cache import KVCache
from serve.engine.sequence import Batch
from serve.engine.transfer import NOTHING_DRAWN, Drawn, last_known, on_device

logger = logging.getLogger(__name__)

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a function: gives what runs it again, and the tensor that holds its result after each run."""

Row = tuple[int, int, int]
"""Of a decode: its token id, its position and its slot."""


def buckets(num_slots: int) -> list[int]:
    """The batch sizes that are recorded, smallest first: powers of two, and the largest batch there is."""
    sizes = [1 << power for power in range(num_slots.bit_length()) if 1 << power < num_slots]
    return [*sizes, num_slots]


class DecodeStep:
    """A decode step of ``size`` sequences over inputs at fixed addresses.

    Args:
        size: Sequences.  Where there are fewer, the first one is computed again in the places that are left: it
            writes the same keys and values to the same place, and its other results are not read.
        model: Its attention is :mod:`serve.engine.attention`.
        cache: With a kernel in ``varlen``.
    """

    def __init__(self, size: int, model: Any, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._patterns = sorted(set(cache.patterns), key=str)
        device: torch.device = model.device
        num_fields = 3 + 2 * len(self._patterns)
        self._inputs = torch.zeros(num_fields, size, dtype=torch.int64, device=device)
        self._begins = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._every_row = torch.arange(size, device=device)
        self._size = size

    def fill(self, rows: Sequence[Row]) -> None:
        """Write the inputs of at most ``size`` decodes, once the steps that were launched before have read theirs."""
        rows = [*rows, *[rows[0]] * (self._size - len(rows))]
        starts = [slot * self._cache.max_len for _, _, slot in rows]
        positions = [position for _, position, _ in rows]
        fields = [[token_id for token_id, _, _ in rows], positions, list(map(add, starts, positions))]
        for pattern in self._patterns:
            firsts = [pattern.first(position) for position in positions]
            fields.append(list(map(add, starts, firsts)))
            fields.append([position - first + 1 for position, first in zip(positions, firsts, strict=True)])
        # Out of memory of its own each time: the copy of the step before may not have begun yet.
        self._inputs.copy_(on_device(fields, self._inputs.device))

    def fill_pending(self, sequences: tuple[sequence.Sequence, ...], drawn: Drawn) -> None:
        """Write the tokens that only the device knows over those of :meth:`fill`."""
        repeated = [sequences[0]] * (self._size - len(sequences))
        drawn.fill(self._inputs[0], [*sequences, *repeated])

    def run(self) -> Tensor:
        """Logits ``[size, vocab_size]``.  Everything that depends on the inputs is computed on the device."""
        views: dict[Any, Any] = {}
        for number, pattern in enumerate(self._patterns):
            starts, used = (self._inputs[field].int() for field in (3 + 2 * number, 4 + 2 * number))
            spans = flash.Spans(self._begins, F.pad(starts, (0, 1)), used, 1, self._cache.max_len, flash.EVERYTHING)
            views[pattern] = flash.SpanView(spans, None)
        rows = dict.fromkeys((key[0] for key, _ in self._cache.shapes), self._inputs[2])
        with running(StepContext(self._cache, self._size, rows, views)):
            return self._model(
                input_ids=self._inputs[0:1],
                position_ids=self._inputs[1:2],
                use_cache=False,
                logits_to_keep=self._every_row,
            ).logits[0]


class DecodeGraphs:
    """The recorded steps of a model.

    Args:
        model: Its attention is :mod:`serve.engine.attention`.
        cache: Whose addresses the graphs will hold.
        record: How to record; on a GPU :class:`CudaRecorder`.
    """

    def __init__(self, model: Any, cache: KVCache, record: Record) -> None:
        self._cache = cache
        self._recorded: dict[int, tuple[DecodeStep, Callable[[], None], Tensor]] = {}
        tolerance = gate.TOLERANCE[model.dtype]
        # The largest first: the others find their memory in its pool.
        for size in reversed(buckets(cache.num_slots)):
            step = DecodeStep(size, model, cache)
            # Position 0 of the slots: written again by whatever sequence comes first.
            step.fill([(1, 0, slot) for slot in range(size)])
            expected = step.run().float()
            replay, logits = record(step.run)
            replay()
            off_by = gate.off_by(expected, logits.float())
            if not off_by <= tolerance:
                raise RuntimeError(f"a graph of {size} sequences is off by {off_by:.2g} of the logits' spread")
            self._recorded[size] = step, replay, logits
        self._sizes = sorted(self._recorded)

    @property
    def sizes(self) -> list[int]:
        """The batch sizes that are recorded."""
        return self._sizes

    def logits(self, batch: Batch, drawn: Drawn = NOTHING_DRAWN) -> Tensor:
        """Logits ``[num_decodes, vocab_size]`` of a step without prompts; they stay until the next one is launched.

        ``drawn`` holds what is pending.
        """
        self._cache.move(batch.moves)
        for each in batch.decodes:
            self._cache.extend(each.slot, each.num_computed_tokens, each.num_computed_tokens + 1)
        count = len(batch.decodes)
        step, replay, logits = self._recorded[next(size for size in self._sizes if size >= count)]
        step.fill([(last_known(each), each.num_computed_tokens, each.slot) for each in batch.decodes])
        step.fill_pending(batch.decodes, drawn)
        replay()
        return logits[:count]


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, since one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A :data:`Record`.

        Raises:
            RuntimeError: the function waits for the GPU, or does something else that no graph can hold.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Libraries set themselves up in their first calls; and a failed recording would leave torch's allocator in a
        # state of its own, so what a graph cannot hold is found here.
        with torch.cuda.stream(stream):
            run()
            with _without_waiting():
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


@contextmanager
def _without_waiting() -> Generator[None]:
    """An operation that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def record_all(model: Any, cache: KVCache) -> DecodeGraphs | None:
    """Graphs of a model on a GPU, or None where they are not possible, with the reason logged."""
    if cache.varlen is None:
        logger.info("CUDA graphs: none (the model's attention is not FlashAttention)")
        return None
    try:
        graphs = DecodeGraphs(model, cache, CudaRecorder())
    except RuntimeError as error:  # torch.OutOfMemoryError is one too
        logger.warning("CUDA graphs: none (%s)", (str(error) or type(error).__name__).splitlines()[0])
        torch.cuda.empty_cache()
        return None
    logger.info("CUDA graphs: for up to %s sequences", ", ".join(map(str, graphs.sizes)))
    return graphs
