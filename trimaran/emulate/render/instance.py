"""The server as a process within its plan: memory is watched, and it sees the limits that a container would see."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from trimaran.emulate.render.scene import Scene
from trimaran.platforms.render.plans import Plan

SAMPLE_S = 0.05
MB = 2**20


class Instance:
    """One run of the server.

    Args:
        scene: What Render would give it.
        disk: The folder that stands for its file system.
        log: Where its output goes.
    """

    def __init__(self, scene: Scene, disk: Path, log: Path) -> None:
        self._plan, self._log = scene.plan, log
        self.peak_bytes: int | None = None
        self.is_over = False
        limits = _write_limits(scene.plan, disk)
        self._used = limits / "memory.current"
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve"],
                cwd=disk,
                env={**scene.environment(disk), "TRIMARAN_CGROUP_ROOT": str(limits)},
                stdout=output,
                stderr=output,
            )
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            used = memory_of(self.process.pid)
            if used:  # a process that is ending has none left
                self.peak_bytes = max(self.peak_bytes or 0, used)
                self._used.write_text(str(used), encoding="ascii")
                if used > self._plan.memory_mb * MB:
                    self.is_over = True
                    self.process.kill()
            threading.Event().wait(SAMPLE_S)

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self.process.poll() is None

    def terminate(self) -> None:
        """SIGTERM, as at a deploy."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int | None:
        """The exit status; None, and SIGKILL, when it takes longer."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.close()
            return None

    def close(self) -> None:
        """SIGKILL whatever is left."""
        self.process.kill()
        self.process.wait()
        self._watching.join()

    def last_lines(self, count: int = 3) -> str:
        """The end of what it has written."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-count:])


def _write_limits(plan: Plan, disk: Path) -> Path:
    """The plan as a control group's files, which the engine sizes itself by."""
    folder = disk / "cgroup"
    folder.mkdir(exist_ok=True)
    contents = {
        "cpu.max": f"{round(plan.num_cpus * 100_000)} 100000",
        "memory.max": str(plan.memory_mb * MB),
        "memory.current": "0",
        "memory.stat": "inactive_file 0",
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="ascii")
    return folder


def memory_of(pid: int) -> int | None:
    """Bytes that a process and its children hold and that cannot be taken back; None where Linux's /proc is missing.

    Mapped files, such as weights, do not count: a container at its limit drops and reads them anew.
    """
    total: int | None = None
    for each in _tree(pid):
        try:
            lines = Path(f"/proc/{each}/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        held = [line.split() for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
        total = (total or 0) + sum(int(fields[1]) * 1024 for fields in held)
    return total


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from _tree(int(child))
    except OSError:
        return
