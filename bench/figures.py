"""Numbers from samples, and where they are written down."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

Summary = dict[str, float]


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the samples lie, interpolated between neighbours.

    Raises:
        ValueError: no samples, or ``percent`` outside 0..100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"no {percent}th percentile of {len(values)} samples")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    # Clamped: rounding must not leave the range of the two neighbours.
    between = ordered[below] + (ordered[above] - ordered[below]) * (place - below)
    return min(max(between, ordered[below]), ordered[above])


def summary_ms(seconds: Sequence[float]) -> Summary | None:
    """Mean, p50, p95, p99 and maximum in milliseconds; None without samples."""
    if not seconds:
        return None
    figures = {f"p{percent}": percentile(seconds, percent) for percent in (50, 95, 99)}
    figures = {"mean": fmean(seconds), **figures, "max": max(seconds)}
    return {name: round(value * 1000, 2) for name, value in figures.items()}


FAST_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
"""What a processor can or cannot do decides the figures more than its name."""


def machine() -> str:
    """Cores, processor, its instructions for arithmetic, and Python in one line."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
        flags = set(next((line.partition(": ")[2] for line in lines if line.startswith("flags")), "").split())
    except OSError:
        pass
    cores, fast = len(os.sched_getaffinity(0)), ", ".join(flag for flag in FAST_INSTRUCTIONS if flag in flags)
    return f"{cores} cores, {model}{f' ({fast})' if fast else ''}, Python {platform.python_version()}"


def load_average() -> float:
    """Processes that wanted a core, on average over the last minute."""
    return round(os.getloadavg()[0], 2)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what is between the page's ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: the page lacks the markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no {begin} ... {end}; put both lines where the figures belong")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
