"""Embeds texts of many requests in batches, on a thread of its own.  Torch-free, and knows no event loop."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Protocol

from serve.errors import EngineError, GenerationFailed, ShuttingDown

logger = logging.getLogger(__name__)

TokenIds = Sequence[int]
Vector = bytes
"""Little-endian float32 numbers."""

LAST_BATCH_S = 10.0
"""Seconds to wait for the present batch when the embedder is closed; one that has had them already hangs."""

MAX_BATCH = 64
"""Texts taken from the queue at once; a request that comes meanwhile waits for them alone."""


class VectorModel(Protocol):
    """Computes one batch; called on the embedder's thread alone."""

    def embed(self, batch: Sequence[TokenIds]) -> list[Vector | None]:
        """One vector for each text; None where it is not finite.

        Raises:
            EngineError: nothing of this batch counts.
        """
        ...


class Embedder:
    """The queue before a model.

    The first texts of every request come before the second ones of any, so that a long list delays nobody much.
    """

    def __init__(self, model: VectorModel) -> None:
        self._model = model
        self._queue: list[tuple[int, int, TokenIds, Future[Vector]]] = []
        self._arrivals = itertools.count()
        self._changed = threading.Condition()
        self._running: list[Future[Vector]] = []
        self._began: float | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="embedder", daemon=True)
        self._thread.start()

    @property
    def num_texts(self) -> int:
        """Texts that wait or are being embedded."""
        return len(self._queue) + len(self._running)

    @property
    def batch_age_s(self) -> float:
        """Seconds that the present batch has been running; 0.0 between batches."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def submit(self, texts: Sequence[TokenIds]) -> list[Future[Vector]]:
        """Queue a request's texts.  Cancel a future, and its text is left out."""
        futures: list[Future[Vector]] = [Future() for _ in texts]
        with self._changed:
            if self._is_closed:
                raise ShuttingDown("the server is shutting down; try again")
            arrival = next(self._arrivals)
            for place, (text, future) in enumerate(zip(texts, futures, strict=True)):
                heapq.heappush(self._queue, (place, arrival, text, future))
            self._changed.notify()
        return futures

    def fail_all(self, error: Exception) -> None:
        """End every request that waits or runs; what a batch at work gives comes too late."""
        with self._changed:
            waiting, self._queue = self._queue, []
            running = list(self._running)
        for *_, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for future in running:
            with suppress(InvalidStateError):  # its batch has just ended
                future.set_exception(error)

    def close(self) -> None:
        """Stop the thread after its current batch, unless that hangs."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(0.0 if self.batch_age_s > LAST_BATCH_S else LAST_BATCH_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running, self._began = [], None
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
                taken = [heapq.heappop(self._queue) for _ in range(min(MAX_BATCH, len(self._queue)))]
                batch = [(text, future) for *_, text, future in taken if future.set_running_or_notify_cancel()]
                self._running, self._began = [future for _, future in batch], time.monotonic()
            if batch:
                self._embed(batch)

    def _embed(self, batch: Sequence[tuple[TokenIds, Future[Vector]]]) -> None:
        try:
            vectors = self._model.embed([text for text, _ in batch])
            answers = list(zip(batch, vectors, strict=True))
        except Exception as error:
            if not isinstance(error, EngineError):
                logger.exception("Embedding %d texts failed", len(batch))
            failure = error if isinstance(error, EngineError) else GenerationFailed("the embedding failed")
            answers = [(each, failure) for each in batch]
        for (_, future), answer in answers:
            with suppress(InvalidStateError):  # everything was ended meanwhile
                if isinstance(answer, Vector):
                    future.set_result(answer)
                else:
                    future.set_exception(answer or GenerationFailed("the embedding of this text is not finite"))
