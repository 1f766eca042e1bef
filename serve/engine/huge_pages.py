"""The weights of a CPU's model onto huge pages, once they lie where they stay.

A step reads all weights, and with pages of 4 KiB it looks up an address for each of them.  oneDNN's packed tensors do
not say where they are, and their memory comes from malloc, page by page.  So all of the process's own memory is looked
through, and the kernel is asked to put together what is filled to the last byte of a huge page: no memory is added.

The standard library only.  Nothing depends on it: whatever fails, memory stays as it was.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from serve.engine.device import available_ram

logger = logging.getLogger(__name__)

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/maps")
PAGEMAP = Path("/proc/self/pagemap")
SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")

WORTH_IT = 16 * 2**20
"""The addresses of smaller weights are remembered by the processor anyway."""

DELAY_S = 5.0
"""The start comes first, and its first request.  A GiB takes 0.25 s of one processor where the kernel has the memory at
hand, but ten times as long where a virtual machine must get it from its host."""

ENOUGH_FREE = 128 * 2**20
"""Two MiB are needed at a time, but they are taken from the page cache where nothing is free."""

WINDOW = 16 * 2**20
"""Looked at and put together at once: between the two, another thread may change what lies there."""

NUM_REFUSALS = 3
"""After so many for want of memory there is no point in going on."""

COLLAPSE = 25
"""``MADV_COLLAPSE``, of Linux 6.1; the module ``mmap`` has no name for it."""
HUGEPAGE = 14
"""``MADV_HUGEPAGE``: before 6.1 the kernel only takes the wish, and fulfils it in the minutes that follow."""

LIBC = ctypes.CDLL(None, use_errno=True)

ENTRY_BYTES = 8
"""Of one page in ``/proc/self/pagemap``."""
HIGHEST_BYTE = 7 if sys.byteorder == "little" else 0
IS_OWN = bytes(number & 0x81 == 0x81 for number in range(256))
"""Of an entry's highest byte: the page is present, and no other has a part in it, as in the one of zeros, which stands
for all that was read before it was written."""

Advise = Callable[[int, int, int], int]
"""``madvise``: address, length, advice; 0, or the error's number."""


def start(num_bytes: int, delay_s: float = DELAY_S) -> threading.Timer | None:
    """Put weights of ``num_bytes`` onto huge pages, later and in the background, and log one line about it.

    Returns:
        Who does it; ``None`` where it is not worth it.
    """
    if num_bytes < WORTH_IT:
        return None
    timer = threading.Timer(delay_s, lambda: logger.info("Huge pages: %s", promote(available_ram())))
    timer.name, timer.daemon = "huge-pages", True
    timer.start()
    return timer


def promote(free: int, setting: Path = SETTING, maps: Path = MAPS, advise: Advise | None = None) -> str:
    """Put full memory onto huge pages; what came of it, in words.

    Args:
        free: Bytes of memory that may still be taken.
        setting: The kernel's, which must not say ``never``.
        maps: The memory to look through.
        advise: In place of the kernel.
    """
    advise = advise or _advise
    try:
        size = _size(setting)
        if isinstance(size, str):
            return size
        if free < ENOUGH_FREE:
            return f"none (only {free >> 20} MiB of memory are free)"
        # Of no bytes: whether the kernel knows the word.
        advice = HUGEPAGE if advise(0, 0, COLLAPSE) else COLLAPSE
        before = _huge_bytes()
        wished = refused = 0
        for begin, length in _full(maps, size):
            error = advise(begin, length, advice)
            wished += length if not error else 0
            refused += error in {errno.ENOMEM, errno.EBUSY}
            if refused == NUM_REFUSALS:
                break
        if advice == HUGEPAGE:
            return f"{wished >> 20} MiB to be put on them by the kernel, which takes minutes (at once with Linux 6.1)"
        stopped = "; the kernel has no memory for more" if refused == NUM_REFUSALS else ""
        return f"{_huge_bytes() >> 20} MiB of memory on them, {before >> 20} before{stopped}"
    except (OSError, ValueError, AttributeError) as error:  # a call or a file of the kernel's that is not there
        return f"none ({error})"


def _size(setting: Path) -> int | str:
    """Of a huge page; or why there are none."""
    if sys.platform != "linux":
        return "none (not Linux)"
    try:
        if "[never]" in setting.read_text(encoding="ascii"):
            return f"none (never, says {setting})"
        return int(SIZE.read_text(encoding="ascii"))
    except OSError:
        return "none (this kernel has none)"


def _full(maps: Path, size: int) -> Iterator[tuple[int, int]]:
    """Begin and length of the memory that fills huge pages to the last byte."""
    each = size // mmap.PAGESIZE
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        for begin, end in _private(maps.read_text(encoding="utf-8").splitlines()):
            first, last = -(-begin // size) * size, end // size * size
            for window in range(first, last, max(WINDOW, size)):
                pagemap.seek(window // mmap.PAGESIZE * ENTRY_BYTES)
                num_pages = min(max(WINDOW, size), last - window) // mmap.PAGESIZE
                pages = pagemap.read(num_pages * ENTRY_BYTES)[HIGHEST_BYTE::ENTRY_BYTES].translate(IS_OWN)
                is_full = [0 not in pages[at : at + each] for at in range(0, len(pages), each)]
                yield from ((window + at * size, length * size) for at, length in _runs(is_full))


def _private(lines: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Begin and end of what is written to, and neither shared nor a file's, of lines of ``/proc/self/maps``."""
    for line in lines:
        span, access, _, _, inode = line.split()[:5]
        if access == "rw-p" and inode == "0":
            begin, end = span.split("-")
            yield int(begin, 16), int(end, 16)


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """Where each run of true ones begins, and its length."""
    begin = 0
    for at, flag in enumerate([*flags, False]):
        if not flag:
            if at > begin:
                yield begin, at - begin
            begin = at + 1


def _advise(begin: int, length: int, advice: int) -> int:
    done = LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), ctypes.c_int(advice)) == 0
    return 0 if done else ctypes.get_errno()


def _huge_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0
