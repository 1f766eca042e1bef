"""The container's own limits of CPU and memory, in either version of Linux control groups.  Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(os.environ.get("TRIMARAN_CGROUP_ROOT", "/sys/fs/cgroup"))
"""Elsewhere only where a platform is emulated, whose limits this process shall believe in."""

NO_LIMIT_V1 = 2**62
"""Version 1 writes the largest page-aligned number instead of ``max``."""


def cpus(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the container may use; ``None`` without a limit."""
    try:
        if (root / "cpu.max").exists():
            limit, period = _read(root / "cpu.max").split()
            return None if limit == "max" else int(limit) / int(period)
        quota = int(_read(root / "cpu" / "cpu.cfs_quota_us"))
        return quota / int(_read(root / "cpu" / "cpu.cfs_period_us")) if quota > 0 else None
    except (OSError, ValueError):
        return None


def free_memory(root: Path = ROOT) -> int | None:
    """Bytes that the container may still take; ``None`` without a limit.

    Files that were read, such as the weights, count as used, and are given back when memory is needed.
    """
    is_v1 = not (root / "memory.max").exists()
    folder = root / "memory" if is_v1 else root
    limit_name, used_name = ("limit_in_bytes", "usage_in_bytes") if is_v1 else ("max", "current")
    try:
        limit = _read(folder / f"memory.{limit_name}")
        if limit == "max" or int(limit) >= NO_LIMIT_V1:
            return None
        statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
        inactive = int(statistics.get("total_inactive_file" if is_v1 else "inactive_file", 0))
        return max(0, int(limit) - int(_read(folder / f"memory.{used_name}")) + inactive)
    except (OSError, ValueError):
        return None


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()
