"""Is the engine alive?  Ends a server whose step hangs or whose model gives nothing but rubbish, so that the platform
replaces it; and asks an engine that has been idle for a token before the server goes on calling itself ready.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping

from serve.engine.base import Engine
from serve.errors import EngineDead, GenerationFailed, ServeError
from serve.types import GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)

QUIET_S = 120.0
"""After so long without a token, being ready has to be proven again."""

CANARY_LIMIT_S = 10.0
"""A canary's token takes milliseconds on a GPU and less than a second on a CPU."""

BAD_STEPS = 3
"""So many steps in a row without one finite row: is it the requests, or the model?  A canary tells."""


class Stopwatch:
    """How long a step has been running, without the time in which the whole process stood still.

    A container may be frozen, and a laptop sleeps: the step is as old as that afterwards, and does not hang.
    """

    def __init__(self) -> None:
        self._stood_still_s = 0.0

    def running_s(self, step_age_s: float, since_last_look_s: float, lag_s: float) -> float:
        """Of the step that was begun so long ago; ``lag_s`` of the time since the last look nothing ran at all."""
        if step_age_s < since_last_look_s:  # another step than at the last look
            self._stood_still_s = 0.0
        self._stood_still_s = min(self._stood_still_s + max(0.0, lag_s), step_age_s)
        return step_age_s - self._stood_still_s


class Watchdog:
    """Looks at the engine's pulse from the event loop.

    Args:
        engine: Started.
        step_timeout_s: A step that takes longer hangs.
        die: Called once with the reason, when the server cannot go on.
        others: What else has steps: its name, and how long the present one has been running.
    """

    def __init__(
        self,
        engine: Engine,
        step_timeout_s: float,
        die: Callable[[ServeError], None],
        others: Mapping[str, Callable[[], float]] | None = None,
    ) -> None:
        self.loop_lag_s = 0.0
        """How much later than it was due the event loop came back to the last look, in seconds."""
        self._engine = engine
        self._step_timeout_s = step_timeout_s
        self._die = die
        self._ages = {"engine": lambda: self._engine.stats().step_age_s, **(others or {})}
        self._stopwatches = {name: Stopwatch() for name in self._ages}
        self._watching: asyncio.Task[None] | None = None
        self._canary: asyncio.Task[None] | None = None
        self._canary_sent_at = 0.0

    def start(self) -> None:
        """Watch until :meth:`stop`."""
        self._watching = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """Look no more."""
        for task in (self._watching, self._canary):
            if task is not None:
                task.cancel()

    def is_answering(self) -> bool:
        """Whether the engine gave a token lately, or at least is not late with one.  Sends a canary when in doubt."""
        stats = self._engine.stats()
        if stats.step_age_s > QUIET_S:  # it may come back, and is replaced if it does not; meanwhile it answers nobody
            return False
        if stats.token_age_s > QUIET_S and not (stats.num_running or stats.num_waiting):
            self._send_canary()
        waits = self._canary is not None and not self._canary.done()
        return not (waits and time.monotonic() - self._canary_sent_at > CANARY_LIMIT_S)

    async def _watch(self) -> None:
        pause_s = min(1.0, self._step_timeout_s / 4)
        while True:
            began = time.monotonic()
            await asyncio.sleep(pause_s)
            since_last_look_s = time.monotonic() - began
            self.loop_lag_s = since_last_look_s - pause_s
            for name, age_s in self._ages.items():
                seconds = self._stopwatches[name].running_s(age_s(), since_last_look_s, self.loop_lag_s)
                if seconds > self._step_timeout_s:
                    limit = f"SERVE_STEP_TIMEOUT_S={self._step_timeout_s:g}"
                    self._end(f"the {name} hangs: a step has been running for {seconds:.0f} s, longer than {limit}")
                    return
            if self._engine.stats().num_bad_steps >= BAD_STEPS:
                self._send_canary()

    def _send_canary(self) -> None:
        if self._canary is None or self._canary.done():
            self._canary_sent_at = time.monotonic()
            self._canary = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        """Generate one token of a prompt that hurts no model."""
        params = SamplingParams(max_tokens=1, temperature=0.0)
        request = GenerationRequest(request_id=f"canary-{uuid.uuid4().hex}", prompt_token_ids=(0,), params=params)
        try:
            stream = self._engine.submit(request)
        except ServeError as error:  # it is busy, which is a sign of life, or dead, which is known
            logger.debug("No canary: %s", error.message)
            return
        try:
            while events := await stream.next():
                if isinstance(events[-1].error, GenerationFailed):
                    self._end("the model's logits are not finite for any request")
        finally:
            stream.close()

    def _end(self, why: str) -> None:
        logger.error("The server ends: %s", why)
        self._die(EngineDead(why))
