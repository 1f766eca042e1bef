"""How soon and how steadily ``/health`` answers: ``python -m bench.latency --help``.

Figures, never a test.  One keep-alive connection asks every 10 ms (a) from process start until the model is ready,
(b) while a prompt of 200 000 words is refused, (c) during 8 parallel generations.  ``late_ms`` is how much later than
due this process itself woke up: where it is large, the machine was busy and the other figures are too high.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.figures import load_average, machine, percentile, table, write_section
from bench.processes import HOST, BenchError, free_port, server
from trimaran import demo_model

EVERY_S = 0.01
LOAD_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 30.0
NUM_WORDS = 200_000
NUM_PARALLEL = 8
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
REPOSITORY = Path(__file__).parents[1]


@dataclass(slots=True)
class Health:
    """What one connection saw of ``/health``."""

    began: float
    """When the process was started, or polling began; seconds of :func:`time.perf_counter`."""
    answers: list[tuple[float, float, str]] = field(default_factory=list[tuple[float, float, str]])
    """For each answer: seconds since ``began`` when asked, seconds it took, and the state or phase it named."""
    late: list[float] = field(default_factory=list[float])
    """Seconds that each pause of this process was too long."""

    def poll(self, connection: http.client.HTTPConnection, is_over: Callable[[str], bool]) -> None:
        """Ask every 10 ms until ``is_over`` says so of the state that an answer named."""
        status = ""
        while not is_over(status):
            asked = time.perf_counter()
            connection.request("GET", "/health")
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            took = time.perf_counter() - asked
            status = str(answer["status"])
            if status == "dead":
                raise BenchError(f"the server is dead: {answer.get('message')}")
            self.answers.append((asked - self.began, took, answer.get("phase") or status))
            self.pause(EVERY_S - took)

    def pause(self, seconds: float) -> None:
        """Sleep, and note by how much it was too long."""
        if seconds > 0:
            began = time.perf_counter()
            time.sleep(seconds)
            self.late.append(time.perf_counter() - began - seconds)

    def figures(self) -> dict[str, Any]:
        """Number of answers, median, p99 and slowest in milliseconds; the slowest ones with time and phase."""
        took = [seconds for _, seconds, _ in self.answers]
        slowest = sorted(self.answers, key=lambda answer: -answer[1])[:5]
        return {
            "num_answers": len(took),
            "p50_ms": round(percentile(took, 50) * 1000, 1),
            "p99_ms": round(percentile(took, 99) * 1000, 1),
            "slowest_ms": round(max(took) * 1000, 1),
            "late_ms": round(max(self.late, default=0.0) * 1000, 1),
            "slowest": [
                {"at_s": round(at, 2), "ms": round(seconds * 1000, 1), "phase": phase} for at, seconds, phase in slowest
            ],
        }


def connect(process: subprocess.Popen[bytes], port: int, health: Health) -> http.client.HTTPConnection:
    """Connect as soon as the port is open.

    Raises:
        BenchError: the server ended or opened no port.
    """
    while time.perf_counter() - health.began < LOAD_TIMEOUT_S:
        if process.poll() is not None:
            raise BenchError(f"the server ended with status {process.returncode}")
        connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_TIMEOUT_S)
        with suppress(ConnectionRefusedError):
            connection.connect()
            return connection
        health.pause(EVERY_S)
    raise BenchError("the server opened no port")


def watch_start(process: subprocess.Popen[bytes], port: int, began: float) -> dict[str, Any]:
    """(a): from process start until ready."""
    health = Health(began)
    connection = connect(process, port, health)
    health.poll(connection, lambda status: status == "ready")
    first_at, first_took, _ = health.answers[0]
    ready_at = health.answers[-1][0]
    connection.request("GET", "/version")
    phases = json.loads(connection.getresponse().read())["phases"]
    connection.close()
    return {"first_answer_s": round(first_at + first_took, 3), "ready_s": round(ready_at, 2), "phases": phases} | (
        health.figures()
    )


def watch_during(port: int, act: Callable[[], object]) -> dict[str, Any]:
    """Poll while ``act`` runs in a thread.  Its own work should be in another process or in C.

    Raises:
        BenchError: ``act`` failed.
    """
    failures: list[Exception] = []

    def work() -> None:
        try:
            act()
        except Exception as error:
            failures.append(error)

    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_TIMEOUT_S)
    health, thread = Health(time.perf_counter()), threading.Thread(target=work)
    thread.start()
    health.poll(connection, lambda _: not thread.is_alive())
    connection.close()
    if failures:
        raise BenchError(f"the load failed: {failures[0]}")
    return health.figures()


def send_long_prompt(port: int) -> None:
    """One request of 200 000 words; it exceeds the context, which only its tokens can show."""
    text = "harbour lamp " * (NUM_WORDS // 2)
    body = json.dumps({"model": demo_model.NAME, "messages": [{"role": "user", "content": text}]})
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    if answer.get("error", {}).get("code") != "context_length_exceeded":
        raise BenchError(f"a prompt of {NUM_WORDS} words got HTTP {response.status}: {str(answer)[:200]}")


def send_parallel(port: int) -> None:
    """Eight streams at once, from a process of their own."""
    options = ["--url", f"http://{HOST}:{port}", "--model", demo_model.NAME, "--max-tokens", "64"]
    count = ["--concurrency", str(NUM_PARALLEL), "--requests", str(NUM_PARALLEL)]
    command = [sys.executable, "-m", "bench.load", *options, *count]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"bench.load ended with status {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}")


def measure(model: Path) -> dict[str, Any]:
    """One server, from its start to its end."""
    port = free_port()
    environment = {"SERVE_MODEL": str(model), "SERVE_HOST": HOST, "SERVE_PORT": str(port)}
    environment["PYTHONPATH"] = str(REPOSITORY)
    began = time.perf_counter()
    with server([sys.executable, "-m", "serve"], environment) as process:
        start = watch_start(process, port, began)
        idle = watch_during(port, lambda: time.sleep(2.0))
        long_prompt = watch_during(port, lambda: send_long_prompt(port))
        return {
            "start": start,
            "idle": idle,
            "long_prompt": long_prompt,
            "parallel": watch_during(port, lambda: send_parallel(port)),
        }


def as_page(runs: Sequence[dict[str, Any]], load: float) -> str:
    """The runs as Markdown: slowest answers, and the phases of the quickest start."""
    names = {"start": "loading", "idle": "idle", "long_prompt": "200 000-word prompt", "parallel": "8 generations"}
    header = [
        "run",
        "first answer, s",
        "ready, s",
        *(f"slowest while {name}, ms" for name in names.values()),
        "late, ms",
    ]
    rows: list[list[str]] = []
    for number, run in enumerate(runs, start=1):
        start, worst = run["start"], [f"{run[name]['slowest_ms']:.0f}" for name in names]
        late = max(run[name]["late_ms"] for name in names)
        rows.append([str(number), f"{start['first_answer_s']:.2f}", f"{start['ready_s']:.1f}", *worst, f"{late:.0f}"])
    best = min((run["start"] for run in runs), key=lambda start: start["ready_s"])
    phases = table(["phase", "s"], [[name, f"{seconds:.2f}"] for name, seconds in best["phases"].items()])
    return f"{machine()}; load average before: {load}.\n\n{table(header, rows)}\n\nThe quickest start:\n\n{phases}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON object a run; return 1 when a run failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, choices=range(1, 21), metavar="N")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/benchmarks.md")
    options = parser.parse_args(argv)
    runs: list[dict[str, Any]] = []
    load = load_average()
    try:
        model = demo_model.prepare()
        for _ in range(options.runs):
            runs.append(measure(model))
            print(json.dumps(runs[-1]), flush=True)
    except (BenchError, OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    page = as_page(runs, load)
    print(page)
    if options.write:
        write_section(PAGE, "latency", page)
    return 0


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
