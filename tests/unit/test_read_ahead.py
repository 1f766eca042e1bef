"""Weights are in the page cache when the reading ahead ends, within what memory allows."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from serve.read_ahead import CHUNK_BYTES, MEMORY_SHARE, reading_ahead

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is in the page cache")


def uncached_file(path: Path, num_chunks: int) -> Path:
    with path.open("wb") as file:
        for number in range(num_chunks):
            file.write(bytes([number]) * CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def cached_chunks(path: Path) -> list[bool]:
    """For each chunk, whether the page in its middle is in the page cache; asking does not read it."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as pages:
        address = ctypes.c_char.from_buffer(pages)
        resident = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.byref(address), ctypes.c_size_t(size), resident) == 0
        del address
    return [bool(resident[(offset + CHUNK_BYTES // 2) // mmap.PAGESIZE] & 1) for offset in range(0, size, CHUNK_BYTES)]


def test_reading_ahead_fills_the_page_cache(tmp_path: Path) -> None:
    path = uncached_file(tmp_path / "model.safetensors", 3)
    assert cached_chunks(path) == [False] * 3
    with reading_ahead([path], free_bytes=2**34):
        deadline = time.monotonic() + 20
        while not all(cached_chunks(path)) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert cached_chunks(path) == [True] * 3


def test_reading_ahead_stops_where_memory_would_be_short(tmp_path: Path) -> None:
    path = uncached_file(tmp_path / "model.safetensors", 3)
    with reading_ahead([path], free_bytes=int(1.5 * CHUNK_BYTES / MEMORY_SHARE)):
        deadline = time.monotonic() + 20
        while not cached_chunks(path)[0] and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
    assert cached_chunks(path) == [True, False, False]


def test_reading_ahead_ignores_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with reading_ahead([tmp_path / "missing", tmp_path / "folder.safetensors"], free_bytes=2**34):
        pass


def test_reading_ahead_leaves_no_thread(tmp_path: Path) -> None:
    path = uncached_file(tmp_path / "model.safetensors", 1)
    before = set(threading.enumerate())
    with reading_ahead([path], free_bytes=2**34):
        pass
    assert set(threading.enumerate()) <= before
