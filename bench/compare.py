"""This server and its peers under the same load, in one run: ``scripts/bench --help``.

The figure is CPU milliseconds per output token: the CPU time of a server's processes, all on one core, divided by the
tokens that its clients got.  It hardly depends on what else the machine does; wall figures do, and are rough.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.figures import load_average, machine, table, write_section
from bench.processes import HOST, BenchError, cores, free_port, server, wait_until_ready
from trimaran import demo_model

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "benchmarks.md"
OURS = "trimaran"
PLAIN = "transformers serve"
BATCHING = "transformers serve --continuous-batching"
# Its default KV cache takes most of the machine's memory; these are enough for every run here.
BATCHING_BLOCKS = "256"
LOAD_TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class Contender:
    """A server and how to speak to it."""

    name: str
    command: list[str]
    ready_path: str
    model: str
    """Its id in requests."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    options: list[str] = field(default_factory=list[str])
    """For ``bench.load``."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Who runs, at which numbers of clients, with how many requests each."""

    names: tuple[str, ...]
    num_requests: dict[int, int]
    """By number of clients."""
    max_tokens: int


QUICK = Plan((OURS, PLAIN), {1: 2, 8: 8}, 64)
FULL = Plan((OURS, PLAIN, BATCHING), {1: 4, 8: 16, 32: 32}, 64)


def contender(name: str, model: Path, port: int) -> Contender:
    """The server of that name, to be started on ``port``; defaults wherever there are any."""
    place = ["--host", HOST, "--port", str(port)]
    if name == OURS:
        environment = {"SERVE_MODEL": str(model), "PYTHONPATH": str(REPOSITORY)}
        return Contender(name, [sys.executable, "-m", "serve", *place], "/ready", demo_model.NAME, environment)
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), *place]
    if name == BATCHING:
        command += ["--continuous-batching", "--cb-num-blocks", BATCHING_BLOCKS]
    return Contender(name, command, "/health", str(model), options=["--no-usage"])


def run_contender(name: str, model: Path, plan: Plan) -> Iterator[tuple[int, dict[str, Any]]]:
    """Start a server on one core, put it under each load from the other; the figures by number of clients.

    Raises:
        BenchError: the server did not come up.
    """
    server_core, client_core = cores()
    port = free_port()
    peer = contender(name, model, port)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **peer.environment}
    with server(peer.command, environment, server_core) as process:
        took_s = wait_until_ready(process, port, peer.ready_path)
        print(f"{name}: ready after {took_s:.1f} s", file=sys.stderr, flush=True)
        for clients, num_requests in plan.num_requests.items():
            options = ["--concurrency", str(clients), "--requests", str(num_requests), "--pid", str(process.pid)]
            options += ["--max-tokens", str(plan.max_tokens), "--timeout", str(LOAD_TIMEOUT_S), *peer.options]
            yield clients, load(f"http://{HOST}:{port}", peer.model, options, client_core)


def load(url: str, model: str, options: Sequence[str], core: int) -> dict[str, Any]:
    """Run ``bench.load`` in a process of its own.

    Raises:
        BenchError: it gave no figures.
    """
    command = ["taskset", "-c", str(core), sys.executable, "-m", "bench.load", "--url", url, "--model", model, *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise BenchError(f"bench.load ended with status {done.returncode}: {done.stderr[-500:]}") from None


def as_table(plan: Plan, figures: dict[tuple[str, int], dict[str, Any]]) -> str:
    """One row for each number of clients and server; the ratio is the server's CPU per token by ours."""
    header = [
        "server",
        "clients",
        "CPU ms / token",
        "ratio",
        "tokens / s",
        "TTFT p50, ms",
        "ITL p50, ms",
        "MiB",
        "failed",
    ]
    rows: list[list[str]] = []
    for clients in plan.num_requests:
        ours = figures[OURS, clients]["cpu_ms_per_token"]
        for name in plan.names:
            found = figures[name, clients]
            cost = found["cpu_ms_per_token"]
            ratio = f"{cost / ours:.2f}" if cost and ours else "-"
            latencies = [f"{found[key]['p50']:.0f}" if found[key] else "-" for key in ("ttft_ms", "itl_ms")]
            speed, memory = f"{found['tokens_per_s']:.0f}", str(found["memory_mib"])
            failed = str(sum(found["errors"].values()))
            rows.append([name, str(clients), f"{cost:.2f}" if cost else "-", ratio, speed, *latencies, memory, failed])
    return table(header, rows)


def run(plan: Plan, model: Path) -> str:
    """Measure every contender, one after the other; the table with what was measured on."""
    before, began = load_average(), time.perf_counter()
    figures: dict[tuple[str, int], dict[str, Any]] = {}
    for name in plan.names:
        for clients, found in run_contender(name, model, plan):
            figures[name, clients] = found
            print(json.dumps({"server": name, **found}), file=sys.stderr, flush=True)
    versions = ", ".join(f"{package} {version(package).partition('+')[0]}" for package in ("torch", "transformers"))
    about = (
        f"{machine()}, {versions}; {plan.max_tokens} tokens a request; load average before the run {before}, "
        f"after it {load_average()}; {time.perf_counter() - began:.0f} s."
    )
    return f"{about}\n\n{as_table(plan, figures)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 when a server could not be measured."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="under 3 minutes: 1 and 8 clients, transformers serve only"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args(argv)
    try:
        text = run(QUICK if options.quick else FULL, demo_model.prepare())
    except (BenchError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(text)
    if options.write:
        write_section(PAGE, "compare", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
