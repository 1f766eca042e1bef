"""Memory on huge pages: the same bytes and not one page more, or a reason."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import sys
from pathlib import Path

import pytest

from serve.engine import huge_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has transparent huge pages")

HUGE = 2 * 2**20
PLENTY = 2**40


class Region:
    """Private memory that begins and ends within a huge page; ``maps`` names it alone."""

    def __init__(self, folder: Path) -> None:
        self.pages = mmap.mmap(-1, 6 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        self.first = -(-address // HUGE) * HUGE
        """Of its huge pages; there are five at least."""
        self.offset = self.first - address
        self.maps = folder / "maps"
        span = f"{address:x}-{address + 6 * HUGE:x}"
        self.maps.write_text(
            f"{span} r--p 00000000 00:00 0 \n{span} rw-s 00000000 00:00 0 \n{span} rw-p 00000000 fe:00 7 /a file\n"
            f"{span} rw-p 00000000 00:00 0 \n"
        )

    def fill(self, huge_page: int, num_bytes: int = HUGE) -> None:
        begin = self.offset + huge_page * HUGE
        self.pages[begin : begin + num_bytes] = os.urandom(num_bytes)

    def counted(self, what: str) -> int:
        """Bytes, as the kernel counts them for this memory."""
        begin = f"{self.first - self.offset:x}-"
        lines = iter(Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines())
        next(line for line in lines if line.startswith(begin))
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


class Kernel:
    """Says what it was asked for."""

    def __init__(self, *, collapses: bool = True, error: int = 0) -> None:
        self.collapses, self.error = collapses, error
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, begin: int, length: int, advice: int) -> int:
        if not length:
            return 0 if self.collapses else errno.EINVAL
        self.asked.append((begin, length, advice))
        return self.error


@pytest.fixture
def region(tmp_path: Path) -> Region:
    made = Region(tmp_path)
    # Kernels may fill more than what is written where their setting says ``always``.
    made.pages.madvise(mmap.MADV_NOHUGEPAGE)
    return made


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    (tmp_path / "size").write_text(f"{HUGE}\n")
    monkeypatch.setattr(huge_pages, "SIZE", tmp_path / "size")
    return path


def test_promote_keeps_bytes_and_takes_no_memory(tmp_path: Path) -> None:
    """On this kernel, whatever it has.  What was read but never written is one shared page of zeros."""
    done: list[int] = []

    def advise(begin: int, length: int, advice: int) -> int:
        error = huge_pages._advise(begin, length, advice)
        done.append(length if not error and advice == huge_pages.COLLAPSE else 0)
        return error

    def promoted() -> tuple[int, int]:
        """Bytes on huge pages beyond those that were asked for, and all."""
        region = Region(tmp_path)
        region.pages.madvise(mmap.MADV_NOHUGEPAGE)
        for page in (0, 1, 3):
            region.fill(page)
        region.fill(2, HUGE // 2)
        before = region.pages[:]
        done.clear()
        region.pages.madvise(mmap.MADV_HUGEPAGE)
        assert huge_pages.promote(PLENTY, maps=region.maps, advise=advise)
        assert region.pages[:] == before
        return region.counted("AnonHugePages:") - sum(done), region.counted("Rss:")

    # The kernel has a thread that may do as much by itself, and fills pages up: then once more.
    assert (0, 3 * HUGE + HUGE // 2) in (promoted() for _ in range(3))


def test_promote_asks_for_full_huge_pages_only(region: Region, setting: Path) -> None:
    kernel = Kernel()
    for page in (0, 1, 4):
        region.fill(page)
    region.fill(2, HUGE - mmap.PAGESIZE)
    huge_pages.promote(PLENTY, setting, region.maps, kernel)
    assert kernel.asked == [
        (region.first, 2 * HUGE, huge_pages.COLLAPSE),
        (region.first + 4 * HUGE, HUGE, huge_pages.COLLAPSE),
    ]


def test_promote_wishes_where_the_kernel_cannot_collapse(region: Region, setting: Path) -> None:
    kernel = Kernel(collapses=False)
    region.fill(1)
    said = huge_pages.promote(PLENTY, setting, region.maps, kernel)
    assert kernel.asked == [(region.first + HUGE, HUGE, huge_pages.HUGEPAGE)]
    assert said.startswith("2 MiB to be put on them by the kernel")


def test_promote_gives_up_when_memory_is_refused(region: Region, setting: Path) -> None:
    for page in (0, 2, 4):
        region.fill(page)
    lines = region.maps.read_text()
    region.maps.write_text(lines * 2)
    kernel = Kernel(error=errno.ENOMEM)
    said = huge_pages.promote(PLENTY, setting, region.maps, kernel)
    assert len(kernel.asked) == huge_pages.NUM_REFUSALS
    assert "the kernel has no memory for more" in said
    kernel = Kernel(error=errno.EINVAL)  # of this memory, as of one that must not be huge
    assert "no memory" not in huge_pages.promote(PLENTY, setting, region.maps, kernel)
    assert len(kernel.asked) == 6


@pytest.mark.parametrize(
    ("says", "free", "reason"),
    [
        ("always madvise [never]", PLENTY, "none (never, says "),
        ("always [madvise] never", 100 * 2**20, "none (only 100 MiB of memory are free)"),
        (None, PLENTY, "none (this kernel has none)"),
    ],
)
def test_promote_leaves_memory_alone(region: Region, setting: Path, says: str | None, free: int, reason: str) -> None:
    region.fill(0)
    kernel = Kernel()
    if says is None:
        setting.unlink()
    else:
        setting.write_text(says)
    assert huge_pages.promote(free, setting, region.maps, kernel).startswith(reason)
    assert kernel.asked == []


def test_promote_outlives_what_is_missing(region: Region, setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert huge_pages.promote(PLENTY, setting, setting / "maps", Kernel()).startswith("none (")
    setting.with_name("size").write_text("two")
    assert huge_pages.promote(PLENTY, setting, region.maps, Kernel()).startswith("none (")
    setting.with_name("size").write_text(f"{HUGE}")
    monkeypatch.setattr(huge_pages, "LIBC", object())
    assert huge_pages.promote(PLENTY, setting, region.maps).startswith("none (")


def test_start_logs_one_line_and_only_for_weights_that_gain(
    setting: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(huge_pages, "promote", lambda free: f"all, with {free > 0}")
    assert huge_pages.start(huge_pages.WORTH_IT - 1) is None
    assert caplog.messages == []
    timer = huge_pages.start(huge_pages.WORTH_IT, delay_s=0)
    assert timer is not None
    timer.join()
    assert caplog.messages == ["Huge pages: all, with True"]
