"""Server processes under measurement: started on one core, watched through /proc, ended with their children."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

HOST = "127.0.0.1"
STOP_TIMEOUT_S = 15.0


class BenchError(Exception):
    """The measurement cannot go on; the message says why."""


def tree(pid: int) -> list[int]:
    """A process and its living descendants."""
    found: list[int] = []
    todo = [pid]
    while todo:
        found.append(todo.pop())
        for children in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            try:
                todo += map(int, children.read_text(encoding="ascii").split())
            except OSError:  # it ended meanwhile
                continue
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, of a process tree; children that ended are in their parent's sum."""
    ticks = 0
    for member in tree(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> float:
    """Memory of a process tree in MiB; pages shared by n processes count 1/n each."""
    return sum(_rollup_kib(member, {"Pss:"}) for member in tree(pid)) / 1024


def private_memory_mib(pid: int) -> float:
    """Memory in MiB that a process tree shares with no other process, so that what others do does not change it.

    Where the kernel does not tell it apart, it is all that is resident.
    """
    if Path("/proc/self/smaps_rollup").exists():
        return sum(_rollup_kib(member, {"Private_Clean:", "Private_Dirty:"}) for member in tree(pid)) / 1024
    answer = subprocess.run(["/bin/ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return int(answer.stdout.strip() or 0) / 1024


def _rollup_kib(pid: int, names: set[str]) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:  # it ended meanwhile
        return 0
    return sum(int(fields[1]) for line in lines if (fields := line.split())[0] in names)


def cores() -> tuple[int, int]:
    """The core for servers and the one for clients; the same when there is one only."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def server(
    command: Sequence[str], environment: Mapping[str, str], core: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, on one core if given; its log goes to a temporary file.

    On an error inside, the end of the log is added to the message.
    """
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SERVE_")}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        log = Path(folder, "server.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*pinned, *command],
                cwd=folder,  # no .env of the developer
                env={**inherited, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield process
        except BenchError as error:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise BenchError(f"{error}\nThe end of the server's log:\n{tail}") from error
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process group that :func:`server` started."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sig)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue


def wait_until_ready(process: subprocess.Popen[bytes], port: int, path: str, timeout_s: float = 180.0) -> float:
    """Poll ``path`` slowly until it answers 200; return the seconds that took.

    Raises:
        BenchError: the server ended, or did not get ready.
    """
    began = time.perf_counter()
    while time.perf_counter() - began < timeout_s:
        if process.poll() is not None:
            raise BenchError(f"the server ended with status {process.returncode} before it was ready")
        connection = http.client.HTTPConnection(HOST, port, timeout=10)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == http.HTTPStatus.OK:
                return time.perf_counter() - began
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise BenchError(f"the server was not ready after {timeout_s:.0f} s")
