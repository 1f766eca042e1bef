"""Starts ``trimaran run`` with the demo model, waits until it is ready, and prints one answer as it arrives."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from serve.errors import ServeError
from trimaran import demo_model

HOST = "127.0.0.1"
QUESTION = "What is the capital of France? Answer in one short sentence."
READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 40.0


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def main() -> int:
    """Return the exit status: 0 when an answer arrived."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Serve the demo model and ask it a question.")
    parser.add_argument("--once", action="store_true", help="stop after the first answer")
    once: bool = parser.parse_args().once
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="trimaran-demo-"))
    log = folder / "server.log"
    try:
        model = demo_model.prepare()
        port = choose_port(os.environ.get("PORT", ""))
        with running_server(model, port, log) as server:
            wait_until_ready(server, port)
            ask(port)
            if not once:
                print(advice(port, log), flush=True)
                raise DemoError(f"the server ended by itself with status {server.wait()}")
    except (DemoError, ServeError, OSError, http.client.HTTPException) as error:
        return fail(error, log)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
    log.unlink(missing_ok=True)
    folder.rmdir()
    return 0


def choose_port(wanted: str) -> int:
    """Return ``wanted``, or the first free port from 8000 on."""
    if wanted and not wanted.isdecimal():
        raise DemoError(f"PORT={wanted} is no number: set PORT to a free port, or leave it out")
    for port in [int(wanted)] if wanted else range(8000, 8100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
    raise DemoError(f"port {wanted or '8000 to 8099'} is taken: set PORT to a free one")


@contextlib.contextmanager
def running_server(model: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server in a session of its own, so that Ctrl-C reaches it through us, once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SERVE_")}
    command = [sys.executable, "-m", "trimaran.cli", "run", str(model), "--host", HOST, "--port", str(port)]
    # Another working folder, so that a .env file here does not change the demo.
    with log.open("wb") as output, subprocess.Popen(
        command, cwd=log.parent, env=environment, stdout=output, stderr=output, start_new_session=True
    ) as server:  # fmt: skip
        try:
            yield server
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    """Poll ``/ready`` and show what it says."""
    start = time.monotonic()
    shown = ""
    while (state := ready_state(port)) != "ready":
        elapsed_s = time.monotonic() - start
        if server.poll() is not None:
            raise DemoError(f"the server ended with status {server.returncode} before it was ready")
        if elapsed_s > READY_TIMEOUT_S:
            raise DemoError(f"the server was not ready after {READY_TIMEOUT_S:.0f} s")
        if sys.stderr.isatty():
            print(f"\r\033[K{state} ... {elapsed_s:.0f} s ", end="", file=sys.stderr, flush=True)
        elif state != shown:
            print(f"{state} ...", file=sys.stderr, flush=True)
        shown = state
        time.sleep(0.2)
    end = "\n" if sys.stderr.isatty() else ""
    print(f"{end}Ready after {time.monotonic() - start:.1f} s.", file=sys.stderr, flush=True)


def ready_state(port: int) -> str:
    """What ``/ready`` says, in a few words; ``ready`` when requests are answered."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        body = response.read()
    except OSError:
        return "Starting the server"
    finally:
        connection.close()
    if response.status == http.HTTPStatus.OK:
        return "ready"
    with contextlib.suppress(ValueError, TypeError, KeyError):
        answer = json.loads(body)
        return f"The model is {answer['status']}" + (f" ({answer['phase']})" if answer.get("phase") else "")
    return "Loading the model"


def ask(port: int) -> None:
    """Send one streamed chat request and print the text as it arrives."""
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    with contextlib.closing(connection):
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(chat_body(stream=True)), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise DemoError(f"the answer was HTTP {response.status}: {response.read().decode(errors='replace')}")
        print(f"\n> {QUESTION}\n", flush=True)
        num_characters = 0
        for text in streamed_text(response):
            num_characters += len(text)
            print(text, end="", flush=True)
        print("\n", flush=True)
    if num_characters == 0:
        raise DemoError("the answer was empty")


def streamed_text(response: http.client.HTTPResponse) -> Iterator[str]:
    """The pieces of text of a server-sent event stream.  A line is decoded whole, so no character is ever cut."""
    for line in response:
        kind, _, data = line.decode("utf-8").rstrip("\r\n").partition(": ")
        if kind != "data":
            continue
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise DemoError(f"the stream ended with an error: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            yield choice["delta"].get("content") or ""
    raise DemoError("the stream broke off before its end")


def chat_body(*, stream: bool) -> dict[str, object]:
    """The demo's request."""
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": demo_model.NAME, "messages": messages, "temperature": 0, "max_tokens": 64, "stream": stream}


def advice(port: int, log: Path) -> str:
    """What to try next."""
    address = f"http://{HOST}:{port}"
    return (
        f"Playground: {address}/\n"
        f"Log:        {log}\n\n"
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(chat_body(stream=False))}'\n\n"
        "Serving until Ctrl-C ..."
    )


def fail(error: Exception, log: Path) -> int:
    """Explain ``error`` with the end of the server's log; returns the exit status."""
    print(f"\nThe demo failed: {error}", file=sys.stderr)
    if log.exists():
        with log.open(encoding="utf-8", errors="replace") as lines:
            tail = "".join(deque(lines, maxlen=30))
        print(f"The end of {log}:\n{tail}", file=sys.stderr)
    else:
        log.parent.rmdir()
    return 1


if __name__ == "__main__":
    sys.exit(main())
