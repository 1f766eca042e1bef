"""The step loop's thread, which owns the model, and its bridge to the event loop.

The only file of the engine that touches both.  Commands go in through a queue; events come out through one
``call_soon_threadsafe`` a step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable

from serve.engine.base import EngineConfig, ModelFiles, Phase, Runner, TokenStream
from serve.engine.commands import Abort, Add, Command, FailWaiting
from serve.engine.pulse import Pulse
from serve.engine.steps import Events, Steps
from serve.errors import EngineDead, QueueFull, ServeError
from serve.types import Batching, EngineStats, GenerationRequest

logger = logging.getLogger(__name__)

QUIET_S = 0.2
"""Without work for so long, the engine does what was left for later."""
LATER_STEPS = 1000
"""... or after so many steps: who is never idle gains most from it, for a pause of less than a second."""


class StepEngine:
    """An :class:`~serve.engine.base.Engine` around a :class:`Runner`: queue, step loop, delivery."""

    def __init__(self, config: EngineConfig, runner: Runner) -> None:
        self._config = config
        self._runner = runner
        self._files: ModelFiles | None = None
        self._streams: dict[str, TokenStream] = {}
        self._early: dict[str, Add] = {}
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._steps: Steps | None = None
        self._pulse = Pulse()
        self._is_settled = False

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and completion together; ``None`` before ``load``."""
        return self._runner.max_model_len if self._files else None

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below this; ``None`` before ``load``."""
        return self._runner.vocab_size if self._files else None

    @property
    def batching(self) -> Batching | None:
        """Whether requests run in one batch; ``None`` before ``load``."""
        reason = self._runner.alone_reason
        return Batching(reason is None, reason) if self._files else None

    def prepare(self, files: ModelFiles, phase: Phase) -> None:
        """What can be done before a memory snapshot; blocking."""
        self._runner.prepare(files, phase)

    def load(self, files: ModelFiles, phase: Phase) -> None:
        """Bring the model up; blocking, in the loader's thread."""
        self._runner.load(files, phase)
        self._files = files

    def reseed(self) -> None:
        """Take a random state of its own."""
        self._runner.reseed()

    def start(self, on_death: Callable[[ServeError], None]) -> None:
        """Begin stepping on a thread of its own."""
        if self._files is None:
            raise RuntimeError("load() must come before start()")
        self._steps = Steps(self._config, self._runner, self._files, self._pulse)
        for command in self._early.values():
            self._commands.put(command)
        self._early.clear()
        loop = asyncio.get_running_loop()

        def deliver(events: Events) -> None:
            loop.call_soon_threadsafe(self._deliver, events)

        def die(error: ServeError) -> None:
            loop.call_soon_threadsafe(self._die, error, on_death)

        self._thread = threading.Thread(target=self._run, args=(self._steps, deliver, die), name="engine", daemon=True)
        self._thread.start()

    # On the event loop.

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request; it waits while the model is loading."""
        num_slots = self._runner.num_slots if self._files else 0
        num_waiting = len(self._streams) - num_slots
        if num_waiting >= self._config.max_queue and not self._is_newcomer(request):
            message = f"{num_slots} requests are running and {num_waiting} wait; try again later"
            raise QueueFull(message, retry_after=self._pulse.queue_s(num_waiting))
        stream = TokenStream(request.request_id, self.abort, request.cache_scope)
        self._streams[request.request_id] = stream
        command = Add(request, time.perf_counter())
        if self._thread is None:
            self._early[request.request_id] = command
        else:
            self._commands.put(command)
        return stream

    def _is_newcomer(self, request: GenerationRequest) -> bool:
        """Whether only others are here: a caller's flood must not shut another one out, who gets one place more."""
        scopes = {stream.scope for stream in self._streams.values()}
        return bool(scopes) and request.cache_scope not in scopes

    def abort(self, request_id: str) -> None:
        """Drop a request before the next step."""
        if self._streams.pop(request_id, None) and not self._early.pop(request_id, None):
            self._commands.put(Abort(request_id))

    def fail_waiting(self, error: ServeError) -> None:
        """End every request that has no slot yet."""
        if self._thread is None:
            self.fail_all(error)
        else:
            self._commands.put(FailWaiting(error))

    def fail_all(self, error: ServeError) -> None:
        """End every request."""
        for stream in list(self._streams.values()):
            stream.fail(error)

    def stats(self) -> EngineStats:
        """Load at this moment."""
        num_running = self._steps.num_running if self._steps else 0
        return EngineStats(
            num_waiting=max(0, len(self._streams) - num_running),
            num_running=num_running,
            num_slots=self._runner.num_slots if self._files else 0,
            num_steps=self._pulse.num_steps,
            step_age_s=self._pulse.step_age_s,
            token_age_s=self._pulse.token_age_s,
            num_bad_steps=self._pulse.num_bad_steps,
        )

    async def close(self) -> None:
        """Stop the thread after its current step."""
        if self._thread is not None:
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join, self._pulse.patience_s)

    def _deliver(self, events: Events) -> None:
        for request_id, event in events:
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            if event.finish_reason is not None:
                del self._streams[request_id]
                self._pulse.finished()
            stream.put(event)

    def _die(self, error: ServeError, on_death: Callable[[ServeError], None]) -> None:
        self._steps = None  # nothing of it runs any more
        on_death(error)
        self.fail_all(error)

    # On the engine's thread.

    def _run(self, steps: Steps, deliver: Callable[[Events], None], die: Callable[[ServeError], None]) -> None:
        try:
            while True:
                events: Events = []
                if not self._obey(steps, events):
                    return
                if steps.has_work:
                    with self._pulse.step():
                        events += steps.turn()
                if events:
                    deliver(events)
                if self._pulse.num_steps == LATER_STEPS:
                    self._settle()
        except BaseException as error:
            logger.exception("The step loop ended")
            die(EngineDead(f"the engine stopped: {type(error).__name__}"))

    def _obey(self, steps: Steps, events: Events) -> bool:
        """Carry out all commands, waiting for one when there is nothing to step; False means stop."""
        while True:
            try:
                command = self._next(is_idle=not (steps.has_work or events))
            except queue.Empty:
                return True
            if command is None:
                return False
            with self._pulse.step():
                events += steps.obey(command)

    def _next(self, is_idle: bool) -> Command:
        """The next command, for which only an idle engine waits.  Raises ``queue.Empty``."""
        if is_idle and not self._is_settled:
            try:
                return self._commands.get(timeout=QUIET_S)
            except queue.Empty:
                self._settle()
        return self._commands.get(block=is_idle)

    def _settle(self) -> None:
        if not self._is_settled:
            self._is_settled = True
            with self._pulse.step():
                self._runner.settle()
