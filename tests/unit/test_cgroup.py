from __future__ import annotations

from pathlib import Path

import pytest

from serve.engine import cgroup

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v2(limit: str) -> dict[str, str]:
    return {"memory.max": limit, "memory.current": str(GIB), "memory.stat": f"anon 5\ninactive_file {GIB // 2}"}


def v1(limit: str) -> dict[str, str]:
    stat = f"cache 5\ninactive_file 1\ntotal_inactive_file {GIB // 2}"
    files = {"limit_in_bytes": limit, "usage_in_bytes": str(GIB), "stat": stat}
    return {f"memory/memory.{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (v2(str(2 * GIB)), 3 * GIB // 2),
        (v1(str(2 * GIB)), 3 * GIB // 2),
        (v2("max"), None),
        (v1("9223372036854771712"), None),
        (v2(str(GIB // 4)), 0),
        ({}, None),
        (v2("garbage"), None),
    ],
)
def test_free_memory_is_what_the_limit_leaves(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    assert cgroup.free_memory(write(tmp_path, files)) == free


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cpus_are_the_containers_quota(tmp_path: Path, files: dict[str, str], cpus: float | None) -> None:
    assert cgroup.cpus(write(tmp_path, files)) == cpus
