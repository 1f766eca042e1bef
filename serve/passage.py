"""What a gateway has in place of an engine: requests on their way to a model elsewhere, counted and ended as one.

A drain, a failure and the limit of requests at once then work as they do for an engine that computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from serve.engine.base import EngineConfig
from serve.engine.echo import EchoEngine
from serve.errors import QueueFull, ServeError
from serve.types import EngineStats

T = TypeVar("T")


class PassageEngine(EchoEngine):
    """Computes nothing: the echo engine's step loop stays idle, and passages count as running requests.

    Args:
        config: ``max_queue`` limits the passages at once.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._max_passages = config.max_queue
        self._passages: set[Passage] = set()

    def open(self) -> Passage:
        """A new passage; whoever opens it closes it.

        Raises:
            QueueFull: as many as allowed are open.
        """
        if len(self._passages) >= self._max_passages:
            raise QueueFull(f"{self._max_passages} requests pass through this gateway already; try again shortly")
        passage = Passage(self._passages.discard)
        self._passages.add(passage)
        return passage

    def fail_all(self, error: ServeError) -> None:
        """End every passage, and what the step loop may have."""
        super().fail_all(error)
        for passage in list(self._passages):
            passage.fail(error)

    def stats(self) -> EngineStats:
        """Passages as running requests."""
        stats = super().stats()
        return replace(stats, num_running=stats.num_running + len(self._passages))


class Passage:
    """One request's work, a step at a time, so that a deadline, a departure or a shutdown can end any of them."""

    def __init__(self, on_close: Callable[[Passage], None]) -> None:
        self._on_close = on_close
        self._step: asyncio.Task[Any] | None = None
        self._error: ServeError | None = None
        self._at_end: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._deadline: asyncio.TimerHandle | None = None

    def end_by(self, deadline: asyncio.TimerHandle | None) -> None:
        """Hold the timer that fails this passage; closing cancels it."""
        self._deadline = deadline

    def at_end(self, release: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Call ``release`` when the passage closes, whatever ended it."""
        self._at_end.append(release)

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a step; there is one at a time."""
        task = asyncio.ensure_future(work)
        self._step = task
        return task

    async def result(self, task: asyncio.Task[T], timeout_s: float | None = None) -> T | None:
        """The step's result, or None when it has none after ``timeout_s`` seconds; it goes on then.

        Raises:
            ServeError: the step's own, or the one that ended the passage.
        """
        await asyncio.wait({task}, timeout=timeout_s)
        if self._error is not None:
            raise self._error
        return task.result() if task.done() else None

    def fail(self, error: ServeError) -> None:
        """End it with ``error``."""
        self._error = error
        if self._step is not None:
            self._step.cancel()

    def close(self) -> None:
        """Nobody waits any more: what runs for it is cancelled, here and at the remote."""
        self._on_close(self)
        if self._deadline is not None:
            self._deadline.cancel()
        if self._step is not None:
            self._step.cancel()
        releases, self._at_end = self._at_end, []
        for release in releases:
            task = asyncio.ensure_future(release())
            self._ending.add(task)  # a task that nobody holds may be lost
            task.add_done_callback(self._ending.discard)
