"""What limits cost that replicas share: ``python -m bench.sharing postgresql://USER@HOST/NAME``.

Figures, never a test.  Two servers with the echo engine and the same limits, one counting by itself and one in the
database, answer the same short request in turns, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.figures import load_average, machine, table, write_section
from bench.processes import HOST, BenchError, cores, cpu_s, free_port, server, wait_until_ready
from bench.wire import WIRES, request, send

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
NUM_REQUESTS = 2000
LIMITS = {
    "SERVE_ENGINE": "echo",
    "SERVE_LIMIT_REQUESTS_PER_MINUTE": "1000000",
    "SERVE_LIMIT_TOKENS_PER_MINUTE": "100000000",
    "SERVE_LIMIT_TOKENS_PER_DAY": "1000000000",
    "SERVE_LIMIT_CONCURRENCY": "100",
}


def measure(url: str) -> str:
    """The table: each server's latency and CPU time for a request."""
    server_core, _ = cores()
    load, path = load_average(), WIRES[0][1]
    body = json.dumps(request(path, "a", 1, stream=False)).encode()
    kinds = {"in the process": "false", "shared": "true"}
    with ExitStack() as stack:
        servers: list[tuple[int, http.client.HTTPConnection]] = []
        for is_shared in kinds.values():
            port = free_port()
            environment = {
                **LIMITS,
                "SERVE_PORT": str(port),
                "SERVE_LIMITS_SHARED": is_shared,
                "SERVE_RECORDS_URL": url,
            }
            environment["PYTHONPATH"] = str(PAGE.parents[1])
            process = stack.enter_context(server([sys.executable, "-m", "serve"], environment, server_core))
            wait_until_ready(process, port, "/ready")
            servers.append((process.pid, http.client.HTTPConnection(HOST, port, timeout=30)))
        seconds: list[list[float]] = [[] for _ in servers]
        before = [cpu_s(pid) for pid, _ in servers]
        for _ in range(NUM_REQUESTS):
            for taken, (_, connection) in zip(seconds, servers, strict=True):
                began = time.perf_counter()
                send(connection, path, body)
                taken.append(time.perf_counter() - began)
        used = [cpu_s(pid) - cpu for (pid, _), cpu in zip(servers, before, strict=True)]
    rows = [
        [name, part_ms(taken, 0.5), part_ms(taken, 0.99), f"{cpu * 1000 / len(taken):.2f}"]
        for name, taken, cpu in zip(kinds, seconds, used, strict=True)
    ]
    header = ["limits", "p50, ms", "p99, ms", "CPU ms of the server / request"]
    return f"{machine()}; load average before the run {load}.\n\n{table(header, rows)}"


def part_ms(seconds: Sequence[float], part: float) -> str:
    """Milliseconds below which such a part of the requests stayed."""
    return f"{sorted(seconds)[int(len(seconds) * part)] * 1000:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; with ``--write`` put it into the page as well."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharing", description=__doc__)
    parser.add_argument("url", help="a PostgreSQL that may be written to")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args(argv)
    try:
        text = measure(options.url)
    except BenchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(text)
    if options.write:
        write_section(PAGE, "sharing", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
