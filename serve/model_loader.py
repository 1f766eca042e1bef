"""Brings a model up, part by part, each timed: tokenizer, files, a second model for embeddings, the engine."""

from __future__ import annotations

from collections.abc import Callable

from serve.cold_start import ColdStart
from serve.embedding import Embeddings
from serve.engine.base import Engine, ModelFiles
from serve.source import LoadedTokenizer, ModelOrigin


class ModelLoader:
    """Every method blocks, and raises ``ServeError`` when the model cannot be served.

    Args:
        origin: Where tokenizer and weights come from.
        engine: Not yet loaded.
        embeddings: A second model, loaded before the engine takes what memory is left.
        cold_start: Times the parts.
    """

    def __init__(
        self, origin: ModelOrigin, engine: Engine, embeddings: Embeddings | None, cold_start: ColdStart
    ) -> None:
        self._origin = origin
        self._engine = engine
        self._embeddings = embeddings
        self._cold_start = cold_start

    def find(self, announce: Callable[[LoadedTokenizer], object]) -> ModelFiles:
        """The tokenizer, told to ``announce`` at once, then the files."""
        with self._cold_start.phase("tokenizer"):
            tokenizer = self._origin.load_tokenizer()
        announce(tokenizer)
        with self._cold_start.phase("fetch"):
            files = self._origin.fetch(tokenizer)
        if files.num_bytes:
            self._cold_start.weights = (files.origin, files.num_bytes)
        return files

    def prepare(self, files: ModelFiles) -> None:
        """What a memory snapshot may hold of the engine."""
        self._engine.prepare(files, self._cold_start.phase)

    def bring(self, files: ModelFiles) -> None:
        """The models."""
        if self._embeddings is not None:
            self._embeddings.load(self._cold_start.phase)
        self._engine.load(files, self._cold_start.phase)
