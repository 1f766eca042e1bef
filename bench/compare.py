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
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import llama
from bench.bars import picture
from bench.figures import load_average, machine, table, write_section
from bench.processes import HOST, BenchError, cores, free_port, server, wait_until_ready
from serve import kernels
from trimaran import demo_model

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "benchmarks.md"
PICTURE = REPOSITORY / "docs" / "images" / "benchmarks.svg"
OURS = "trimaran"
PLAIN = "transformers serve"
BATCHING = "transformers serve --continuous-batching"
# Its default KV cache takes most of the machine's memory; these are enough for every run here.
BATCHING_BLOCKS = "256"
VLLM = "vLLM-CPU"
LLAMA = "llama.cpp"
# GiB of keys and values; its default is as much.
VLLM_CACHE_GIB = "4"
LOAD_TIMEOUT_S = 900
START_TIMEOUT_S = {VLLM: 600.0}
"""It compiles at its first start; the others are ready in seconds."""
PROMPTS_APART = 100
WARM_UP = 9_000
REST_S = 10.0
"""After a first answer every server may do what it left for later; ours records steps and moves weights."""
LONG_WORDS = 350
"""Words of padding that make a prompt of about 500 tokens."""


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
class Load:
    """What one run sends."""

    clients: int
    num_requests: int
    prompt_words: int = 0
    """Of padding in each prompt."""
    rate: float | None = None
    """Requests that arrive in a second, whatever the server does, in place of clients that wait for their answers."""

    @property
    def title(self) -> str:
        """Clients, or arrivals."""
        return str(self.clients) if self.rate is None else f"{self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class Plan:
    """Who runs, under which loads."""

    names: tuple[str, ...]
    loads: tuple[Load, ...]
    max_tokens: int


QUICK = Plan((OURS, PLAIN), (Load(1, 2), Load(8, 8)), 64)
FULL = Plan((OURS, PLAIN, BATCHING), (Load(1, 4), Load(8, 16), Load(8, 8, LONG_WORDS), Load(32, 32)), 128)


Peers = dict[str, Path]
"""Virtual environments of servers that need one of their own, by name."""

OPEN_REQUESTS = 16


def contender(name: str, model: Path, port: int, peers: Peers) -> Contender:
    """The server of that name, to be started on ``port``; defaults wherever there are any.

    Args:
        name: One of the constants above.
        model: Its folder.
        port: On this machine.
        peers: The virtual environments of those that are not in this one.
    """
    place = ["--host", HOST, "--port", str(port)]
    if name == OURS:
        environment = {"SERVE_MODEL": str(model), "PYTHONPATH": str(REPOSITORY)}
        return Contender(name, [sys.executable, "-m", "serve", *place], "/ready", demo_model.NAME, environment)
    if name == LLAMA:
        command = [str(peers[name] / "bin" / "python"), "-m", "llama_cpp.server", *place]
        command += ["--model", str(llama.model_file()), "--n_ctx", str(llama.CONTEXT)]
        command += ["--n_threads", "1", "--n_threads_batch", "1", "--interrupt_requests", "false"]
        return Contender(name, command, "/v1/models", demo_model.NAME, options=["--no-usage"])
    if name == VLLM:
        vllm = peers[name]
        environment = {"VLLM_CPU_KVCACHE_SPACE": VLLM_CACHE_GIB, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        command = [str(vllm / "bin" / "vllm"), "serve", str(model), "--dtype", "bfloat16", *place]
        return Contender(name, command, "/health", str(model), environment)
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), *place]
    if name == BATCHING:
        command += ["--continuous-batching", "--cb-num-blocks", BATCHING_BLOCKS]
    return Contender(name, command, "/health", str(model), options=["--no-usage"])


def run_contender(name: str, model: Path, plan: Plan, peers: Peers) -> Iterator[tuple[Load, dict[str, Any]]]:
    """Start a server on one core, put it under each load from the other; the figures of each load.

    Raises:
        BenchError: the server did not come up.
    """
    server_core, client_core = cores()
    port = free_port()
    peer = contender(name, model, port, peers)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **peer.environment}
    with server(peer.command, environment, server_core) as process:
        took_s = wait_until_ready(process, port, peer.ready_path, START_TIMEOUT_S.get(name, 180.0))
        print(f"{name}: ready after {took_s:.1f} s", file=sys.stderr, flush=True)
        warm_up = ["--concurrency", "1", "--requests", "1", "--max-tokens", "16", "--first", str(WARM_UP)]
        load(f"http://{HOST}:{port}", peer.model, [*warm_up, *peer.options], client_core)
        time.sleep(REST_S)
        for number, each in enumerate(plan.loads):
            arrival = ["--concurrency", str(each.clients)] if each.rate is None else ["--rate", str(each.rate)]
            options = [*arrival, "--requests", str(each.num_requests)]
            options += ["--prompt-words", str(each.prompt_words), "--pid", str(process.pid)]
            # Each load asks other questions, so that nobody's prefix cache has seen them.
            options += ["--first", str(number * PROMPTS_APART)]
            options += ["--max-tokens", str(plan.max_tokens), "--timeout", str(LOAD_TIMEOUT_S), *peer.options]
            yield each, load(f"http://{HOST}:{port}", peer.model, options, client_core)


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


Figures = dict[tuple[str, Load], dict[str, Any]]
"""Of each server under each load."""


def as_table(plan: Plan, figures: Figures) -> str:
    """One row for each load and server; the ratio is the server's CPU per token by ours."""
    header = ["server", "clients", "prompt", "CPU ms / token", "ratio", "tokens / s", "TTFT p50, ms", "ITL p50, ms"]
    header += ["MiB", "failed"]
    rows: list[list[str]] = []
    for each in plan.loads:
        ours = figures[OURS, each]["cpu_ms_per_token"]
        for name in plan.names:
            found = figures[name, each]
            cost = found["cpu_ms_per_token"]
            row = [name, each.title, str(figures[OURS, each]["prompt_tokens"] or "-")]
            row += [f"{cost:.2f}" if cost else "-", f"{cost / ours:.2f}" if cost and ours else "-"]
            row += [f"{found['tokens_per_s']:.0f}"]
            row += [f"{found[key]['p50']:.0f}" if found[key] else "-" for key in ("ttft_ms", "itl_ms")]
            rows.append([*row, str(found["memory_mib"]), str(sum(found["errors"].values()))])
    return table(header, rows)


def as_picture(plan: Plan, figures: Figures) -> str:
    """The costs as bars, a group for each load; a server that answered nothing has none."""
    groups: list[tuple[str, dict[str, float]]] = []
    for each in plan.loads:
        costs = {name: figures[name, each]["cpu_ms_per_token"] for name in plan.names}
        clients = f"{each.title} client{'s' * (each.clients > 1)}" if each.rate is None else each.title
        prompt = f"prompts of {figures[OURS, each]['prompt_tokens']} tokens"
        groups.append((f"{clients}, {prompt}", {name: cost for name, cost in costs.items() if cost}))
    return picture("What a token costs on one core: CPU time, shorter is better", "ms", groups)


def run(plan: Plan, model: Path, peers: Peers) -> tuple[str, Figures]:
    """Measure every contender, one after the other; the table with what was measured on, and what it shows."""
    before, began = load_average(), time.perf_counter()
    figures: Figures = {}
    for name in plan.names:
        for each, found in run_contender(name, model, plan, peers):
            figures[name, each] = found
            print(json.dumps({"server": name, **found}), file=sys.stderr, flush=True)
    versions = [f"{package} {version(package).partition('+')[0]}" for package in ("torch", "transformers")]
    versions.append(f"{'torch' if kernels.obstacle() else 'Trimaran'}'s kernels")
    versions += peer_versions(peers)
    about = (
        f"{machine()}, {', '.join(versions)}; {plan.max_tokens} tokens a request; "
        f"load average before the run {before}, after it {load_average()}; {time.perf_counter() - began:.0f} s."
    )
    return f"{about}\n\n{as_table(plan, figures)}", figures


def peer_versions(peers: Peers) -> list[str]:
    """What is installed in the peers' environments.

    Raises:
        BenchError: one has not what it is named for.
    """
    found = {VLLM: vllm_versions, LLAMA: lambda environment: [llama.version(environment)]}
    return [each for name, environment in peers.items() for each in found[name](environment)]


def vllm_versions(environment: Path) -> list[str]:
    """vLLM's version and that of the transformers beside it.

    Raises:
        BenchError: there is no vLLM in that environment.
    """
    folders = environment.glob("lib/python*/site-packages/*.dist-info")
    found = dict(folder.name.removesuffix(".dist-info").split("-", 1) for folder in folders)
    name = next((each for each in ("vllm_cpu", "vllm") if each in found), None)
    if name is None or not (environment / "bin" / "vllm").exists():
        raise BenchError(f"{environment} is no virtual environment with vLLM; docs/benchmarks.md says how to make one")
    return [f"vLLM-CPU {found[name]} (transformers {found.get('transformers', 'unknown')})"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 when a server could not be measured."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="under 3 minutes: 1 and 8 clients, transformers serve only"
    )
    parser.add_argument("--vllm", type=Path, metavar="ENVIRONMENT", help="also vLLM-CPU, of this virtual environment")
    parser.add_argument(
        "--llama", type=Path, metavar="ENVIRONMENT", help="also llama.cpp's server, of this virtual environment"
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help=f"also an open loop: {OPEN_REQUESTS} requests, R of them arriving a second",
    )
    parser.add_argument("--write", action="store_true", help="put the table and its picture into docs/")
    options = parser.parse_args(argv)
    plan = QUICK if options.quick else FULL
    try:
        given = {VLLM: options.vllm, LLAMA: options.llama}
        peers = {name: environment.absolute() for name, environment in given.items() if environment is not None}
        peer_versions(peers)  # before minutes of measuring others
        loads = plan.loads if options.rate is None else (*plan.loads, Load(1, OPEN_REQUESTS, rate=options.rate))
        plan = replace(plan, names=(*plan.names, *peers), loads=loads)
        text, figures = run(plan, demo_model.prepare(), peers)
    except (BenchError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(text)
    if options.write:
        write_section(PAGE, "compare", text)
        PICTURE.write_text(as_picture(plan, figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
