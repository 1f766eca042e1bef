"""What the step loop leaves behind for others to see that it is alive.

Written by the engine's thread, read by the event loop; single attributes, so that no lock is needed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from serve.engine.base import StepOutput

LAST_STEP_S = 10.0
RATE_WINDOW_S = 60.0
UNKNOWN_QUEUE_S = 5.0
MIN_QUEUE_S = 1.0
MAX_QUEUE_S = 60.0


class Pulse:
    """When the present step began, when the last token came, and how many steps in a row were good for nothing."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_bad_steps = 0
        self._step_began: float | None = None
        self._token_at = time.monotonic()
        self._finished_at: deque[float] = deque(maxlen=64)

    @contextmanager
    def step(self) -> Generator[None]:
        """Around whatever the step loop does between two looks at its commands: all of that can hang."""
        self._step_began = time.monotonic()
        try:
            yield
        finally:
            self._step_began = None

    def saw(self, output: StepOutput, rows: Sequence[int]) -> None:
        """Note what a step gave to the ``rows`` that somebody waits for.

        A row that failed for a reason of its own says nothing about the model.
        """
        self.num_steps += 1
        told = [output.token_ids[row] for row in rows if row not in output.errors]
        if any(token_id is not None for token_id in told):
            self.num_bad_steps, self._token_at = 0, time.monotonic()
        elif told:
            self.num_bad_steps += 1

    @property
    def step_age_s(self) -> float:
        """Seconds that the present step has been running; 0.0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def patience_s(self) -> float:
        """Seconds to wait for the present step when the engine is closed; a step that has had them already hangs."""
        return 0.0 if self.step_age_s > LAST_STEP_S else LAST_STEP_S

    @property
    def token_age_s(self) -> float:
        """Seconds since the last token of any request, or since the engine was made."""
        return time.monotonic() - self._token_at

    def finished(self) -> None:
        """A request has ended; called on the event loop."""
        self._finished_at.append(time.monotonic())

    def queue_s(self, num_waiting: int) -> float:
        """Seconds in which so many waiting requests will have been served, at the rate of the last minute."""
        now = time.monotonic()
        recent = [at for at in self._finished_at if now - at < RATE_WINDOW_S]
        if not recent:
            return UNKNOWN_QUEUE_S
        seconds = num_waiting * max(now - recent[0], MIN_QUEUE_S) / len(recent)
        return min(max(seconds, MIN_QUEUE_S), MAX_QUEUE_S)
