"""Work on prompts, off the event loop: rendering, tokenising, and the reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from serve.chat.prompt import ChatFormat
from serve.errors import QueueFull
from serve.source import LoadedTokenizer

T = TypeVar("T")

NUM_THREADS = 2


class PromptReader:
    """The tokenizer, once it is there, and the threads that use it.  Used on the event loop alone."""

    def __init__(self) -> None:
        self.tokenizer: LoadedTokenizer | None = None
        self._is_known = asyncio.Event()
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="chat")
        self._num_reading = 0

    def loaded(self, tokenizer: LoadedTokenizer) -> None:
        """The tokenizer came."""
        self.tokenizer = tokenizer
        self.wake()

    def wake(self) -> None:
        """Nobody is to wait for the tokenizer any more."""
        self._is_known.set()

    @contextmanager
    def place(self, limit: int) -> Generator[None]:
        """Count one piece of work.

        Raises:
            QueueFull: there are ``limit`` already.
        """
        if self._num_reading >= limit:
            raise QueueFull(f"{self._num_reading} prompts wait to be tokenised; try again shortly")
        self._num_reading += 1
        try:
            yield
        finally:
            self._num_reading -= 1

    async def wait(self, patience_s: float) -> None:
        """Wait for the tokenizer, at most so many seconds."""
        if self.tokenizer is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_known.wait(), patience_s)

    async def run(self, work: Callable[[ChatFormat], T], tokenizer: LoadedTokenizer) -> T:
        """Call ``work`` in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, tokenizer.chat)

    def close(self) -> None:
        """Start nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
