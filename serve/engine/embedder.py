"""Embeds texts of many requests in batches, on a thread of its own.  Torch-free, and knows no event loop."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from serve.errors import EngineError, GenerationFailed, ShuttingDown

logger = logging.getLogger(__name__)

TokenIds = Sequence[int]
Vector = bytes
"""Little-endian float32 numbers."""

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
        self._num_running = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="embedder", daemon=True)
        self._thread.start()

    @property
    def num_texts(self) -> int:
        """Texts that wait or are being embedded."""
        return len(self._queue) + self._num_running

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
        """End every request that waits."""
        with self._changed:
            waiting, self._queue = self._queue, []
        for *_, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def close(self) -> None:
        """Stop the thread after its current batch."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(10.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._num_running = 0
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
                taken = [heapq.heappop(self._queue) for _ in range(min(MAX_BATCH, len(self._queue)))]
                self._num_running = len(taken)
            batch = [(text, future) for *_, text, future in taken if future.set_running_or_notify_cancel()]
            if batch:
                self._embed(batch)

    def _embed(self, batch: Sequence[tuple[TokenIds, Future[Vector]]]) -> None:
        try:
            vectors = self._model.embed([text for text, _ in batch])
        except Exception as error:
            if not isinstance(error, EngineError):
                logger.exception("Embedding %d texts failed", len(batch))
            failure = error if isinstance(error, EngineError) else GenerationFailed("the embedding failed")
            for _, future in batch:
                future.set_exception(failure)
            return
        for (_, future), vector in zip(batch, vectors, strict=True):
            if vector is None:
                future.set_exception(GenerationFailed("the embedding of this text is not finite"))
            else:
                future.set_result(vector)
