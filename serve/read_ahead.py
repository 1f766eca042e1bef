"""Weights into the page cache while torch is imported: disk or network then work beside the processor."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

CHUNK_BYTES = 16 * 2**20
NUM_THREADS = 4
"""Network volumes answer several readers faster than one; a local disk loses nothing."""

MEMORY_SHARE = 0.6
"""Of the free memory: what is read beyond that would push out what was read before."""


@contextmanager
def reading_ahead(paths: Sequence[Path], free_bytes: int) -> Generator[None]:
    """Read ``paths`` in the background, in their order, until the block ends.

    Nothing depends on it: a file that cannot be read is left to whoever reads it next.  Chunks that are in the page
    cache already are not read again.

    Args:
        paths: Files of weights.
        free_bytes: Memory that may be filled; of larger files only the beginning is read.
    """
    chunks = iter(_chunks(paths, int(free_bytes * MEMORY_SHARE)))
    lock, stop = threading.Lock(), threading.Event()

    def work() -> None:
        buffer = bytearray(CHUNK_BYTES)
        while not stop.is_set():
            with lock:
                chunk = next(chunks, None)
            if chunk is None:
                return
            _read(*chunk, buffer)

    threads = [threading.Thread(target=work, name=f"read-ahead-{number}", daemon=True) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _chunks(paths: Sequence[Path], budget: int) -> list[tuple[Path, int]]:
    chunks: list[tuple[Path, int]] = []
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError:
            continue
        chunks += [(path, offset) for offset in range(0, size, CHUNK_BYTES)]
    return chunks[: budget // CHUNK_BYTES]


def _read(path: Path, offset: int, buffer: bytearray) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not _is_cached(descriptor, offset):
            os.preadv(descriptor, [buffer], offset)
    except OSError:
        return
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether a chunk's first page can be had without waiting; unknown counts as no."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(descriptor, [bytearray(4096)], offset, os.RWF_NOWAIT) > 0
    except OSError:
        return False
