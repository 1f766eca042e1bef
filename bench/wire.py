"""What the wire costs without a model: ``python -m bench.wire --help``.

Figures, never a test.  A server whose engine repeats its prompt, one step each 10 ms, runs on one core; the clients are
on another.  CPU time of the server's process, everything included: HTTP, validation, template, queue, step loop, text,
JSON.  What validation and shaping add to a request is the difference to a row that has neither.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.figures import load_average, machine, table, write_section
from bench.processes import HOST, BenchError, cores, cpu_s, free_port, server, wait_until_ready

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
STEP_S = 0.01
NUM_REQUESTS = 400
NUM_STREAMS = 16
NUM_TOKENS = 600
NUM_ROUNDS = 3
"""The least of them counts: what else runs on the machine makes a round dearer, never cheaper."""

READ_EVERY_S = 0.05
"""A client that waits for each token has to be woken for it, and on loopback the server's own CPU pays for that."""
WIRES = (
    ("POST /v1/chat/completions", "/v1/chat/completions", False),
    ("the same with 8 tools", "/v1/chat/completions", True),
    ("POST /v1/completions", "/v1/completions", False),
    ("POST /v1/responses", "/v1/responses", False),
    ("POST /v1/messages", "/v1/messages", False),
)


def tool(number: int) -> dict[str, Any]:
    """A function among others."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": f"get_weather_{number}", "description": "The weather in a city.", "parameters": parameters}
    return {"type": "function", "function": function}


def request(path: str, text: str, max_tokens: int, *, stream: bool, has_tools: bool = False) -> dict[str, Any]:
    """The same request on each wire."""
    messages = [{"role": "user", "content": text}]
    body: dict[str, Any] = {"model": "echo", "stream": stream, "temperature": 0}
    match path.rpartition("/")[2]:
        case "completions" if path != "/v1/completions":
            body |= {"messages": messages, "max_tokens": max_tokens}
            body |= {"tools": [tool(number) for number in range(8)]} if has_tools else {}
        case "completions":
            body |= {"prompt": text, "max_tokens": max_tokens}
        case "responses":
            body |= {"input": text, "max_output_tokens": max_tokens, "store": False}
        case _:
            body |= {"messages": messages, "max_tokens": max_tokens}
    return body


def send(connection: http.client.HTTPConnection, path: str, body: bytes, pause_s: float = 0.0) -> None:
    """Send one request, a GET without a body, and read its answer to the end, with pauses where they are asked for.

    Raises:
        BenchError: it is not 200.
    """
    connection.request(
        "POST" if body else "GET", path, body or None, {"content-type": "application/json"} if body else {}
    )
    response = connection.getresponse()
    answer = b"" if pause_s else response.read()
    while pause_s and not answer.endswith(b"\r\n0\r\n\r\n"):  # not chunk by chunk: all that has come
        time.sleep(pause_s)
        answer = answer[-8:] + response.fp.read1(1 << 20)
    if response.status != http.HTTPStatus.OK:
        raise BenchError(f"{path} answered {response.status}: {answer[:300]!r}")


def request_cpu_ms(pid: int, port: int, path: str, body: bytes) -> float:
    """CPU milliseconds of a whole request, one after the other."""
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    for _ in range(20):
        send(connection, path, body)
    least = min(_used(pid, lambda: send(connection, path, body), NUM_REQUESTS) for _ in range(NUM_ROUNDS))
    connection.close()
    return least * 1000 / NUM_REQUESTS


def _used(pid: int, work: Callable[[], object], times: int) -> float:
    before = cpu_s(pid)
    for _ in range(times):
        work()
    return cpu_s(pid) - before


def token_cpu_us(pid: int, port: int, path: str, *, has_tools: bool) -> float:
    """CPU microseconds for each token of 16 streams at once."""
    text = "abcdefgh" * (NUM_TOKENS // 8)
    body = json.dumps(request(path, text, NUM_TOKENS, stream=True, has_tools=has_tools)).encode()

    def one(_: int) -> None:
        connection = http.client.HTTPConnection(HOST, port, timeout=60)
        send(connection, path, body, READ_EVERY_S)
        connection.close()

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        list(pool.map(one, range(NUM_STREAMS)))
        least = min(_used(pid, lambda: list(pool.map(one, range(NUM_STREAMS))), 1) for _ in range(NUM_ROUNDS))
    return least * 1e6 / (NUM_STREAMS * NUM_TOKENS)


def validation_us(*, has_tools: bool) -> float:
    """CPU microseconds from a chat completion's bytes to checked fields and messages, in this process."""
    from serve.api.conversation import to_messages  # noqa: PLC0415
    from serve.api.fields import check_fields, validated  # noqa: PLC0415
    from serve.api.routing import parse_json  # noqa: PLC0415
    from serve.api.schemas.chat import ChatCompletionRequest  # noqa: PLC0415
    from serve.settings import Settings  # noqa: PLC0415

    known: dict[str, Any] = {"engine": "echo", "_env_file": None}
    settings = Settings(**known)
    data = json.dumps(request(WIRES[0][1], "Why is the sky blue?", 1, stream=False, has_tools=has_tools)).encode()
    before = time.thread_time()
    for _ in range(NUM_REQUESTS):
        body = validated(ChatCompletionRequest, parse_json(data))
        check_fields(body, settings)
        to_messages(body.messages)
    return (time.thread_time() - before) * 1e6 / NUM_REQUESTS


def measure() -> str:
    """The table: a request without body and answer to speak of, then one row for each wire."""
    server_core, _ = cores()
    port, load = free_port(), load_average()
    command = [sys.executable, "-m", "bench.wire", "--serve", str(port)]
    with server(command, {"PYTHONPATH": str(PAGE.parents[1])}, server_core) as process:
        wait_until_ready(process, port, "/ready")
        rows = [["GET /v1/models", f"{request_cpu_ms(process.pid, port, '/v1/models', b''):.2f}", ""]]
        for name, path, has_tools in WIRES:
            body = json.dumps(request(path, "Why is the sky blue?", 1, stream=False, has_tools=has_tools)).encode()
            cpu_ms = request_cpu_ms(process.pid, port, path, body)
            rows.append([name, f"{cpu_ms:.2f}", f"{token_cpu_us(process.pid, port, path, has_tools=has_tools):.0f}"])
    header = ["request", "CPU ms / request of one token", "CPU µs / streamed token"]
    alone = f"{validation_us(has_tools=False):.0f} µs, with 8 tools {validation_us(has_tools=True):.0f} µs"
    return (
        f"{machine()}; load average before the run {load}.\n\n{table(header, rows)}\n\n"
        f"Of a chat completion's request, validation alone, from bytes to messages: {alone}."
    )


def serve(port: int) -> None:
    """The server under measurement."""
    import uvicorn  # noqa: PLC0415

    from serve.api.app import create_app  # noqa: PLC0415
    from serve.engine.base import EngineConfig  # noqa: PLC0415
    from serve.engine.echo import EchoRunner  # noqa: PLC0415
    from serve.engine.worker import StepEngine  # noqa: PLC0415
    from serve.settings import Settings  # noqa: PLC0415

    settings: dict[str, Any] = {"engine": "echo", "max_batch_size": NUM_STREAMS, "_env_file": None}
    config = EngineConfig(max_batch_size=NUM_STREAMS)
    # A template that has tools, or they would be refused.
    settings["tool_prompt"] = "generic"
    app = create_app(Settings(**settings), StepEngine(config, EchoRunner(config, step_s=STEP_S)))
    uvicorn.run(app, host=HOST, port=port, log_level="warning")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; with ``--write`` put it into the page as well."""
    parser = argparse.ArgumentParser(prog="python -m bench.wire", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--serve", type=int, metavar="PORT", help="be the server under measurement")
    options = parser.parse_args(argv)
    if options.serve is not None:
        serve(options.serve)
        return 0
    try:
        text = measure()
    except BenchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(text)
    if options.write:
        write_section(PAGE, "wire", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
