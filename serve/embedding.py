"""The second, small model behind ``/v1/embeddings``: its files, what they say of its use, and its queue."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve import checkpoint, weights
from serve.chat.tokenizer import HubTokenizer
from serve.embedding_recipe import EmbeddingRecipe, read_recipe
from serve.engine.base import Phase
from serve.engine.embedder import Embedder, TokenIds, Vector
from serve.errors import InvalidRequest, QueueFull, ServeError
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.engine.embedding_model import EncoderModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    recipe: EmbeddingRecipe
    tokenizer: HubTokenizer
    model: EncoderModel
    embedder: Embedder
    vocab_size: int | None


class Embeddings:
    """One embedding model.  ``load`` blocks, in the loader's thread; the rest is called on the event loop.

    Raises:
        ConfigError: the name is malformed.
    """

    def __init__(self, settings: Settings) -> None:
        weights.check_name(settings.embedding_model, "SERVE_EMBEDDING_MODEL")
        self.name = settings.embedding_name
        self._settings = settings
        self._loaded: Future[_Loaded] = Future()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="embeddings")
        self._num_requests = 0

    def load(self, phase: Phase) -> None:
        """Bring the model up, once.

        Raises:
            ModelLoadError: with the reason and the remedy.
        """
        if self._loaded.done():
            return
        from serve.engine.embedding_model import EncoderModel  # noqa: PLC0415

        settings = self._settings
        with phase("embedding_model"):
            found = weights.locate(settings.embedding_model, settings.embedding_revision, settings.trust_remote_code)
            source = weights.fetch_weights(found)
            recipe = read_recipe(source.folder, source.config)
            model = EncoderModel(
                source.folder,
                pooling=recipe.pooling,
                normalizes=recipe.normalizes,
                device=settings.device.value,
                trust_remote_code=settings.trust_remote_code,
            )
            tokenizer = HubTokenizer(source.tokenizer_folder)
            vocab_size = checkpoint.vocab_size(source.config)
            with suppress(InvalidStateError):  # the server failed meanwhile
                self._loaded.set_result(_Loaded(recipe, tokenizer, model, Embedder(model), vocab_size))

    @property
    def max_tokens(self) -> int | None:
        """Tokens of the longest text; None before ``load``."""
        return self._loaded.result().recipe.max_tokens if self.is_loaded else None

    @property
    def is_loaded(self) -> bool:
        """Whether texts can be embedded."""
        return self._loaded.done() and self._loaded.exception() is None

    @property
    def is_busy(self) -> bool:
        """Whether any request runs or waits."""
        return self._num_requests > 0

    @property
    def batch_age_s(self) -> float:
        """Seconds that the present batch has been running; 0.0 without one."""
        return self._loaded.result().embedder.batch_age_s if self.is_loaded else 0.0

    async def wait(self, patience_s: float) -> None:
        """Wait for the model, at most so many seconds."""
        if not self._loaded.done():
            await asyncio.wait({asyncio.wrap_future(self._loaded)}, timeout=patience_s)

    async def embed(self, inputs: Sequence[str | Sequence[int]], dimensions: int | None) -> tuple[list[Vector], int]:
        """A vector for each text, and the number of tokens of all.  Only after :meth:`wait`.

        Raises:
            InvalidRequest: a text is empty or too long, an id is unknown, or vectors have no such size.
            QueueFull: too many requests wait already.
            EngineError: the model failed.
        """
        loaded = self._loaded.result()
        _check_dimensions(dimensions, loaded)
        if self._num_requests > self._settings.max_queue:
            raise QueueFull(f"{self._num_requests} requests wait for embeddings; try again shortly")
        self._num_requests += 1
        futures: list[Future[Vector]] = []
        try:
            texts = await asyncio.get_running_loop().run_in_executor(self._threads, _tokenize, inputs, loaded)
            futures = loaded.embedder.submit(texts)
            vectors = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            for future in futures:
                future.cancel()
            self._num_requests -= 1
        return vectors, sum(map(len, texts))

    def fail_all(self, error: ServeError) -> None:
        """End every request, also those that wait for the model."""
        if self.is_loaded:
            self._loaded.result().embedder.fail_all(error)
        else:
            with suppress(InvalidStateError):
                self._loaded.set_exception(error)

    async def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.is_loaded:
            await asyncio.to_thread(self._loaded.result().embedder.close)


def _tokenize(inputs: Sequence[str | Sequence[int]], loaded: _Loaded) -> list[TokenIds]:
    recipe = loaded.recipe
    texts: list[TokenIds] = []
    for at, given in enumerate(inputs):
        where = "input" if len(inputs) == 1 else f"input[{at}]"
        if isinstance(given, str):
            text: TokenIds = loaded.tokenizer.encode(recipe.prefix + given, adds_special=True) if given else ()
        else:
            text = given
            _check_ids(text, loaded.vocab_size, where)
        if not text:
            raise InvalidRequest(f"{where} is empty; send some text", param=where)
        if len(text) > recipe.max_tokens:
            raise InvalidRequest(
                f"{where} has {len(text)} tokens, but this model reads at most {recipe.max_tokens}; split the text",
                param=where,
            )
        texts.append(text)
    return texts


def _check_ids(token_ids: Sequence[int], vocab_size: int | None, where: str) -> None:
    limit = vocab_size or 2**31
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < limit), None)
    if wrong is not None:
        raise InvalidRequest(
            f"{where} holds the token id {wrong}, but this model's ids are 0 to {limit - 1}", param=where
        )


def _check_dimensions(dimensions: int | None, loaded: _Loaded) -> None:
    own, allowed = loaded.model.dimensions, loaded.recipe.dimensions
    if dimensions is None or dimensions == own:
        return
    if allowed is True and dimensions < own:
        return
    if not isinstance(allowed, bool) and dimensions in allowed:
        return
    sizes = f"1 to {own}" if allowed is True else ", ".join(map(str, sorted({own, *(allowed or ())})))
    raise InvalidRequest(f"dimensions is {dimensions}, but this model's vectors have {sizes}", param="dimensions")
