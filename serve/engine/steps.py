"""The step loop's work between a command and an event: schedule, launch, read.  Torch-free, thread-free.

Where the runner overlaps, a step is launched while the one before still runs, and only then are its tokens read: the
device never waits for Python.  The step ahead is a guess that every running sequence goes on.  Where a token proves it
wrong (an end token, a stop string, a failed row, a cancelled request), the sequence's row of the step ahead is thrown
away.  Sequences under a grammar need their last token on the host before the next can be drawn, so while one runs,
each step is read before the next is launched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.engine.base import EngineConfig, ModelFiles, Runner, StepOutput, fitted
from serve.engine.commands import Abort, Add, FailWaiting
from serve.engine.live import GRAMMAR_FAILED, LiveRequest
from serve.engine.pulse import Pulse
from serve.engine.scheduler import Batch, Scheduler, Sequence
from serve.errors import GenerationFailed, OutOfMemory, ServeError
from serve.types import FinishReason, TokenEvent

logger = logging.getLogger(__name__)

Events = list[tuple[str, TokenEvent]]
"""Each with the id of its request."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and not read."""

    batch: Batch
    read: Callable[[], StepOutput]
    launched_at: float


class Steps:
    """All requests of an engine, and the steps that serve them.

    Args:
        config: The engine's.
        runner: Loaded.
        files: Of its model.
        pulse: Learns of every step.
    """

    def __init__(self, config: EngineConfig, runner: Runner, files: ModelFiles, pulse: Pulse) -> None:
        self._runner = runner
        self._files = files
        self._pulse = pulse
        self._live: dict[str, LiveRequest] = {}
        self._flight: _Flight | None = None
        self._read_at = 0.0
        self._scheduler = Scheduler(
            num_slots=runner.num_slots,
            prefill_chunk_tokens=config.prefill_chunk_tokens,
            eos_token_ids=frozenset(token for token in files.eos_token_ids if token < runner.vocab_size),
            keeps_prefixes=runner.keeps_prefixes,
            gap_s=config.itl_target_s,
        )

    @property
    def has_work(self) -> bool:
        """Whether :meth:`turn` would do anything."""
        return self._flight is not None or self._scheduler.has_work

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return self._scheduler.num_with_slots

    def obey(self, command: Add | Abort | FailWaiting) -> Events:
        """Carry out what the event loop asked for; the events of requests that end by it."""
        events: Events = []
        match command:
            case Add():
                events = self._add(command)
            case Abort(request_id):
                self._live.pop(request_id, None)
                self._scheduler.abort(request_id)
            case FailWaiting(error):
                events = [self._end_with(sequence, error) for sequence in tuple(self._scheduler.waiting)]
        self._scheduler.release()
        return events

    def turn(self) -> Events:
        """Launch a step, if that can be; read the one before, or without overlap the same one."""
        before, events = self._flight, list[tuple[str, TokenEvent]]()
        self._flight = None
        if self._scheduler.has_work and (before is None or not self._must_read_first()):
            self._flight = self._launch(events, is_ahead=before is not None)
        if before is None and not self._runner.overlaps:
            before, self._flight = self._flight, None
        if before is not None:
            events += self._read(before)
        self._scheduler.release()
        return events

    def _must_read_first(self) -> bool:
        """Whether a running sequence's next token depends on one that only the device knows."""
        return any(each.grammar is not None and each.num_pending_tokens for each in self._scheduler.running)

    def _add(self, command: Add) -> Events:
        request = command.request
        try:
            request = fitted(request, self._runner.max_model_len, self._runner.vocab_size)
            grammar = request.params.grammar() if request.params.grammar else None
        except ServeError as error:
            return [(request.request_id, TokenEvent(finish_reason=FinishReason.ERROR, error=error))]
        except Exception as error:
            logger.error("The grammar of request %s failed: %s", request.request_id, type(error).__name__)
            failed = GenerationFailed(GRAMMAR_FAILED)
            return [(request.request_id, TokenEvent(finish_reason=FinishReason.ERROR, error=failed))]
        sequence = self._scheduler.add(request)
        sequence.grammar = grammar
        self._live[request.request_id] = LiveRequest(sequence, self._files.decode, command.submitted_at)
        return []

    def _launch(self, events: Events, *, is_ahead: bool) -> _Flight | None:
        batch = self._scheduler.schedule()
        now = time.perf_counter()
        for chunk in batch.chunks:
            self._live[chunk.sequence.request.request_id].begin(now)
        try:
            read = self._runner.launch(batch)
        except OutOfMemory as error:
            if not is_ahead:  # else it is tried again by itself, when the step before has given its memory back
                events += self._shed(batch, error)
            return None
        self._scheduler.advance(batch)
        return _Flight(batch, read, now)

    def _read(self, flight: _Flight) -> Events:
        output = flight.read()
        now, batch = time.perf_counter(), flight.batch
        # A step that was launched ahead began when the one before had ended.
        self._scheduler.budget.learn(batch, now - max(flight.launched_at, self._read_at))
        self._read_at = now
        rows = self._scheduler.record(batch, [-1 if token_id is None else token_id for token_id in output.token_ids])
        self._pulse.saw(output, rows)
        for index, logprobs in output.prompt_logprobs.items():
            live = self._live.get(batch.chunks[index].sequence.request.request_id)
            if live is not None:  # it may have been cancelled meanwhile
                live.add_prompt_logprobs(logprobs)
        sampled = batch.sampled
        return [self._event(sampled[row], row, output) for row in rows]

    def _shed(self, batch: Batch, error: OutOfMemory) -> Events:
        """A step did not fit: take fewer prompt tokens, or give up the newest request; the rest is tried again."""
        if batch.chunks and self._scheduler.budget.shrink():
            logger.warning("Out of memory in a step of %d prompt tokens: taking fewer", batch.num_prompt_tokens)
            return []
        newest = batch.chunks[-1].sequence if batch.chunks else batch.decodes[-1]
        logger.warning("Out of memory in a step: 1 of %d requests given up", len(self._live))
        return [self._end_with(newest, error)]

    def _event(self, sequence: Sequence, row: int, output: StepOutput) -> tuple[str, TokenEvent]:
        token_id = output.token_ids[row]
        if token_id is None:
            not_finite = GenerationFailed("the model's logits for this request are not finite")
            return self._end_with(sequence, output.errors.get(row, not_finite))
        request_id = sequence.request.request_id
        try:
            event = self._live[request_id].event(token_id, output.logprobs.get(row))
        except ServeError as error:
            return self._end_with(sequence, error)
        if sequence.finish_reason is not None:
            del self._live[request_id]
        return request_id, event

    def _end_with(self, sequence: Sequence, error: ServeError) -> tuple[str, TokenEvent]:
        request_id = sequence.request.request_id
        return request_id, self._live.pop(request_id).failure(error)
