"""loading -> ready -> draining -> dead: one model and its engine, from an open port to the last token.

The HTTP port opens first.  A thread then brings the tokenizer (requests can be validated), the weights and the
engine (requests that waited begin to run).

Where a platform snapshots the process's memory, loading has two stages instead: :meth:`Lifecycle.prepare` before the
snapshot, :meth:`Lifecycle.restored` after it, and only then the port.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import TypeVar

from serve.chat.prompt import ChatFormat
from serve.cold_start import ColdStart, load_failure, without_garbage_collection
from serve.embedding import Embeddings
from serve.engine.base import Engine, ModelFiles, TokenStream, check_vocabulary
from serve.errors import ConfigError, EngineDead, EngineNotReady, ServeError, ShuttingDown
from serve.model_loader import ModelLoader
from serve.reading import PromptReader
from serve.settings import Settings
from serve.source import ModelOrigin
from serve.types import GenerationRequest

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER_LOADING_S = 5.0
RETRY_AFTER_DRAINING_S = 10.0


class State(StrEnum):
    """What the server can do now."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class Lifecycle:
    """Owns the loading thread, the state and the cold-start phases.  Everything else runs on the event loop.

    Args:
        settings: The container's.
        engine: Not yet loaded.
        origin: Where tokenizer and weights come from.
        embeddings: A second model, loaded before the engine takes what memory is left.
    """

    def __init__(
        self, settings: Settings, engine: Engine, origin: ModelOrigin, embeddings: Embeddings | None = None
    ) -> None:
        self.engine = engine
        self.embeddings = embeddings
        self.state = State.LOADING
        self.failure: ServeError | None = None
        self.started_at = time.time()
        self.drain_began = asyncio.Event()
        self.is_drained = False
        self._is_closed = False
        self._settings = settings
        self.cold_start = ColdStart()
        self._loader = ModelLoader(origin, engine, embeddings, self.cold_start)
        self._reader = PromptReader()
        self._files: ModelFiles | None = None
        self._is_loaded = False
        self._is_started = False
        self._thread: threading.Thread | None = None
        self._on_failure: list[Callable[[ServeError], None]] = []

    def start(self) -> None:
        """Begin loading; returns at once.

        Raises:
            RuntimeError: it was started before: an app serves once.
        """
        if self._is_started:
            raise RuntimeError("this app was started before; make another with create_app()")
        self._is_started = True
        if self._is_loaded:
            self._loaded()
            return
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._load, args=(loop,), name="loader", daemon=True)
        self._thread.start()

    def on_failure(self, callback: Callable[[ServeError], None]) -> None:
        """Call ``callback`` when the model cannot be served (any more)."""
        self._on_failure.append(callback)

    @property
    def phases(self) -> Mapping[str, float]:
        """Seconds of each part of the cold start so far."""
        return self.cold_start.phases

    @property
    def current_phase(self) -> str | None:
        """What the loading is busy with."""
        return self.cold_start.current

    # Around a memory snapshot: both block, in one thread, before any event loop runs.

    def prepare(self) -> None:
        """Bring what a snapshot may hold: imports, tokenizer, weights in main memory.

        Leaves no thread, no connection, no open or mapped file of the model, and has not asked for a GPU.

        Raises:
            ServeError: the model cannot be served.
        """
        with without_garbage_collection():
            self._files = self._loader.find(self._reader.loaded)
            self._loader.prepare(self._files)

    def restored(self, settings: Settings) -> None:
        """Bring the rest: device, weights onto it, a random state of its own, warm-up.

        Brings everything when :meth:`prepare` was not called.  A second call, after a snapshot of the loaded model,
        only takes new settings and another random state.

        Args:
            settings: Read again after the restore: keys may have changed.

        Raises:
            ConfigError: the settings name another model or engine than the snapshot holds.
            ServeError: the model cannot be served.
        """
        if self._files is not None:
            if settings.loaded_from != self._settings.loaded_from:
                raise ConfigError("the settings name another model or engine than the snapshot holds; deploy again")
            self.cold_start.restored()
            self.started_at = time.time()
            random.seed()
        self._settings = settings
        if self._is_loaded:
            self.engine.reseed()
            return
        with without_garbage_collection():
            self._files = self._files or self._loader.find(self._reader.loaded)
            self._loader.bring(self._files)
        self._is_loaded = True

    # In the loader's thread.

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            with without_garbage_collection():
                files = self._loader.find(lambda tokenizer: loop.call_soon_threadsafe(self._reader.loaded, tokenizer))
                self._loader.bring(files)
            loop.call_soon_threadsafe(self._loaded)
        except BaseException as error:
            if loop.is_closed():  # the server ended while the model was loading
                return
            with suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(self.fail, load_failure(error))

    # On the event loop.

    def _loaded(self) -> None:
        if self._is_closed:  # too late: nobody would stop an engine that starts now
            return
        total = self.cold_start.end()
        self.engine.start(self.fail)
        if self.state is State.LOADING:
            self.state = State.READY
            logger.info("Ready after %.2f s", total, extra={"phases": dict(self.phases)})

    def fail(self, error: ServeError) -> None:
        """The model cannot be served (any more): end every request, tell whoever runs the server."""
        self.state, self.failure = State.DEAD, error
        self._reader.wake()
        self._fail_all(error)
        for callback in self._on_failure:
            callback(error)

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and completion together, as far as known."""
        known = self._reader.tokenizer.max_model_len if self._reader.tokenizer else None
        return self.engine.max_model_len or known

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below this, as far as known."""
        known = self._reader.tokenizer.vocab_size if self._reader.tokenizer else None
        return self.engine.vocab_size or known

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special ones too; half a character for some.  Empty for an unknown id."""
        return self._reader.tokenizer.chat.tokenizer.token_bytes(token_id) if self._reader.tokenizer else b""

    @property
    def default_sampling(self) -> Mapping[str, float]:
        """What the model's own generation_config.json says of temperature, top_p, top_k and min_p."""
        return self._reader.tokenizer.default_sampling if self._reader.tokenizer else {}

    @property
    def capacity(self) -> int | None:
        """Sequences that may run and wait at once; None before the model is loaded."""
        num_slots = self.engine.stats().num_slots
        return num_slots + self._settings.max_queue if num_slots else None

    def check_admission(self) -> None:
        """Raise the error that a new request would get now: ``ShuttingDown``, ``EngineDead`` or ``ModelLoadError``."""
        if self.state is State.DEAD:
            raise self.failure or EngineDead("the engine stopped")
        if self.state is State.DRAINING:
            raise ShuttingDown("the server is shutting down; try another replica", retry_after=RETRY_AFTER_DRAINING_S)

    async def read(self, work: Callable[[ChatFormat], T], received_at: float) -> T:
        """Render, tokenise or the reverse: call ``work`` off the event loop, once the tokenizer is there.

        ``received_at`` is when the request came, in seconds of :func:`time.perf_counter`.

        Raises:
            EngineNotReady: the tokenizer did not come within ``SERVE_LOAD_WAIT_S``.
            QueueFull: too much is being rendered already.
            RequestError: whatever ``work`` refuses.
        """
        self.check_admission()
        with self._reader.place(self._settings.max_queue + self.engine.stats().num_slots):
            await self._reader.wait(self.patience_s(received_at))
            self.check_admission()
            if self._reader.tokenizer is None:
                raise self.not_ready()
            return await self._reader.run(work, self._reader.tokenizer)

    def submit(self, request: GenerationRequest, received_at: float) -> TokenStream:
        """Queue a request; while the model loads it waits until ``SERVE_LOAD_WAIT_S`` after ``received_at``.

        Raises:
            CapacityError: draining, or the queue is full.
            EngineError: the model cannot be served.
            InvalidRequest: a token id is outside the vocabulary.
        """
        self.check_admission()
        if self.vocab_size is not None:
            check_vocabulary(request, self.vocab_size)
        stream = self.engine.submit(request)
        if self.state is State.LOADING:
            loop = asyncio.get_running_loop()
            loop.call_later(self.patience_s(received_at), self._give_up_waiting, stream)
        return stream

    def patience_s(self, received_at: float) -> float:
        """Seconds that a request which came at ``received_at`` still waits for the model."""
        return max(0.0, self._settings.patience_s - (time.perf_counter() - received_at))

    def _give_up_waiting(self, stream: TokenStream) -> None:
        if self.state is State.LOADING:
            stream.fail(self.not_ready())

    def not_ready(self) -> EngineNotReady:
        """The error of who has waited long enough for the model."""
        doing = f" ({self.current_phase})" if self.current_phase else ""
        return EngineNotReady(f"the model is still loading{doing}; try again", retry_after=RETRY_AFTER_LOADING_S)

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new, let running requests finish for ``timeout_s`` seconds, end the rest with an error."""
        if self.state in {State.LOADING, State.READY}:
            self.state = State.DRAINING
        self.drain_began.set()
        deadline = time.monotonic() + timeout_s
        error = ShuttingDown("the server is shutting down; try again", retry_after=RETRY_AFTER_DRAINING_S)
        self.engine.fail_waiting(error)
        self._reader.wake()  # who waits for it learns of the shutdown
        while self.state is not State.DEAD and self.is_busy and time.monotonic() < deadline:  # noqa: ASYNC110 - by a thread
            await asyncio.sleep(0.02)
        self._fail_all(error)
        self.is_drained = True

    def _fail_all(self, error: ServeError) -> None:
        self.engine.fail_all(error)
        if self.embeddings is not None:
            self.embeddings.fail_all(error)

    @property
    def is_busy(self) -> bool:
        """Whether any request runs or waits."""
        stats = self.engine.stats()
        return bool(stats.num_running or stats.num_waiting or (self.embeddings and self.embeddings.is_busy))

    async def close(self) -> None:
        """Stop the engine.  A loading thread is left behind: imports and copies cannot be interrupted."""
        self._is_closed = True
        await self.engine.close()
        if self.embeddings is not None:
            await self.embeddings.close()
        self._reader.close()
