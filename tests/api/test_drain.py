"""The process: how it starts, why it does not, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest
from support import Running, chat, eventually, joined, openai_error, running, sse_chunks, sse_data

COMPLETIONS = "/v1/chat/completions"


def slow(step_s: float = 0.01) -> str:
    """Python that gives the echo engine's steps a length."""
    return f"from serve.engine import echo; echo.EchoEngine.__init__.__kwdefaults__['step_s'] = {step_s}"


@contextmanager
def streaming(server: Running, text: str, **fields: Any) -> Iterator[Iterator[str]]:
    """A stream that has begun; the rest of its lines."""
    body = chat(text, stream=True, **fields)
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("POST", COMPLETIONS, json=body) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


def rest(lines: Iterator[str]) -> str:
    return "\n".join(lines)


def exit_status(server: Running) -> int:
    return server.process.wait(30)


def failed(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and stderr of a process that ends by itself."""
    with running(*arguments, **environment) as server:
        return exit_status(server), server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_finishes_a_running_stream_and_exits_0(number: signal.Signals) -> None:
    """Case 46."""
    with running(before=slow()) as server:
        with streaming(server, "x" * 150) as lines:
            server.process.send_signal(number)
            chunks = sse_chunks(rest(lines))

        assert joined(chunks).count("x") >= 149
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert exit_status(server) == 0
        assert "Traceback" not in server.log


def test_drain_says_not_ready_and_refuses_new_requests() -> None:
    with running(before=slow(), SERVE_MAX_BATCH_SIZE="1") as server, httpx.Client(base_url=server.url) as client:
        with streaming(server, "x" * 150) as lines:
            server.process.terminate()
            eventually(lambda: client.get("/ready").status_code == 503)

            assert client.get("/ready").json()["status"] == "draining"
            assert client.get("/ready").headers["retry-after"]
            assert client.get("/health").status_code == 200
            assert client.get("/ping").status_code == 503
            for stream in (False, True):
                response = client.post(COMPLETIONS, json=chat("new", stream=stream))
                assert response.status_code == 503
                assert openai_error(response.json())["code"] == "shutting_down"
                assert int(response.headers["retry-after"]) >= 1
            sse_chunks(rest(lines))
        assert exit_status(server) == 0


def test_drain_sends_the_queue_elsewhere() -> None:
    """Case 46: what has no slot yet gets its error at once, not at the deadline."""
    with running(before=slow(), SERVE_MAX_BATCH_SIZE="1") as server:
        port = int(server.url.rpartition(":")[2])
        with streaming(server, "x" * 300) as lines, socket.create_connection(("127.0.0.1", port), timeout=30) as queued:
            body = json.dumps(chat("queued")).encode()
            queued.sendall(
                f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            # Answered after it was queued: both are read from the same loop in order.
            assert httpx.get(server.url + "/version").status_code == 200
            server.process.terminate()

            answer = queued.makefile("rb")
            assert answer.readline().split()[1] == b"503"
            assert b"retry-after" in b"".join(iter(answer.readline, b"\r\n"))
            assert joined(sse_chunks(rest(lines))).count("x") >= 299
        assert exit_status(server) == 0


def test_drain_ends_at_its_deadline_with_an_error_event() -> None:
    with running(before=slow(), SERVE_DRAIN_TIMEOUT_S="0.3") as server:
        with streaming(server, "x" * 4000) as lines:
            server.process.terminate()
            data = sse_data(rest(lines))

        assert data[-1] == "[DONE]"
        assert openai_error(json.loads(data[-2]))["code"] == "shutting_down"
        assert all(json.loads(line)["choices"][0]["finish_reason"] is None for line in data[:-2])
        assert exit_status(server) == 0


def test_drain_ends_at_once_on_the_second_signal() -> None:
    with running(before=slow(), SERVE_DRAIN_TIMEOUT_S="3000") as server, streaming(server, "x" * 4000):
        server.process.terminate()
        eventually(lambda: "draining" in server.log)
        assert server.process.poll() is None

        server.process.terminate()

        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log


def test_drain_does_not_wait_for_a_client_that_reads_nothing() -> None:
    """Case 46: an abandoned stream must not keep the process."""
    body = json.dumps(chat("x" * 400_000, stream=True)).encode()
    with running(SERVE_MAX_MODEL_LEN="1000000", SERVE_DRAIN_TIMEOUT_S="0.5") as server:
        port = int(server.url.rpartition(":")[2])
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(
                f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            assert client.recv(12) == b"HTTP/1.1 200"
            server.process.terminate()

            assert exit_status(server) == 0
        assert "Traceback" not in server.log


def test_drain_does_not_wait_for_the_load() -> None:
    """A copy of weights cannot be interrupted; the process leaves without it."""
    load = "from serve.engine import echo; echo.EchoEngine.__init__.__kwdefaults__['load_s'] = 600"
    with running(before=load) as server:
        assert httpx.get(server.url + "/ready").status_code == 503
        server.process.terminate()

        assert exit_status(server) == 0


def test_drain_forgets_an_idle_connection() -> None:
    with running() as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        server.process.terminate()

        assert exit_status(server) == 0


def test_process_exits_70_when_the_engine_dies() -> None:
    """At once, so that the platform replaces it: there is nothing left to drain."""
    death = slow() + "\ndef step(*_): raise ValueError('torn')\necho.EchoRunner.step = step"
    with running(before=death, SERVE_DRAIN_TIMEOUT_S="3000") as server:
        response = httpx.post(server.url + COMPLETIONS, json=chat("a"), timeout=30)

        assert response.status_code == 503
        assert openai_error(response.json())["code"] == "engine_dead"
        assert server.process.wait(20) == 70


def test_process_exits_2_without_a_model() -> None:
    status, log = failed(SERVE_ENGINE="")

    assert status == 2
    assert log.strip() == "SERVE_MODEL is not set: name a model folder or a Hugging Face id (or SERVE_ENGINE=echo)"


def test_process_exits_2_on_a_public_address_without_keys() -> None:
    status, log = failed(SERVE_HOST="0.0.0.0")  # noqa: S104

    assert status == 2
    assert "SERVE_HOST=0.0.0.0" in log
    assert "SERVE_API_KEYS" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("name", "value"), [("SERVE_PORT", "http"), ("SERVE_ENGINE", "vllm"), ("PORT", "70000"), ("SERVE_LOG_LEVEL", "x")]
)
def test_process_exits_2_and_names_a_wrong_setting(name: str, value: str) -> None:
    status, log = failed(**{"SERVE_PORT": "", name: value})

    assert status == 2
    assert name in log
    assert value in log
    assert "Traceback" not in log


def test_process_exits_3_when_the_model_cannot_be_loaded() -> None:
    status, log = failed(SERVE_ENGINE="transformers", SERVE_MODEL="/nonexistent")

    assert status == 3
    assert "/nonexistent does not exist" in log
    assert "Traceback" not in log


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ((), {"SERVE_PORT": "GOOD", "PORT": "1"}),
        ((), {"SERVE_PORT": "", "PORT": "GOOD"}),
        (("--port", "GOOD"), {"SERVE_PORT": "1", "PORT": "2"}),
        (("serve", "--port=GOOD"), {}),
    ],
)
def test_process_port_comes_from_argument_then_serve_port_then_port(
    arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    port = free_port()
    filled = {name: value.replace("GOOD", port) for name, value in environment.items()}
    with running(*(argument.replace("GOOD", port) for argument in arguments), **filled) as server:
        assert server.url.endswith(":" + port), server.log


def test_process_says_which_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, log = failed(SERVE_PORT=port)

    assert status not in {0, 3, 70}
    assert port in log


def test_sigterm_before_the_server_listens_exits_0() -> None:
    """As the first process of a container it would be ignored, and the platform would kill after its grace period."""
    slow_start = (
        "import sys, time, types; sys.modules['serve.server'] = slow = types.ModuleType('serve.server')\n"
        "slow.run = lambda settings: (print('starting', file=sys.stderr, flush=True), time.sleep(20))"
    )
    with running(before=slow_start) as server:
        eventually(lambda: "starting" in server.log)
        server.process.terminate()
        assert exit_status(server) == 0
        assert "Traceback" not in server.log


def test_server_in_a_thread_finishes_what_runs_and_frees_its_port():
    from serve.api.app import create_app
    from serve.engine.echo import EchoEngine
    from serve.server import BackgroundServer
    from serve.settings import Settings

    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(engine="echo", port=taken.getsockname()[1], _env_file=None)  # pyright: ignore[reportCallIssue]
        with pytest.raises(OSError, match="cannot listen"):
            BackgroundServer(create_app(settings), settings).start()
    server = BackgroundServer(create_app(settings, EchoEngine(step_s=0.02)), settings)
    server.start()
    url = f"http://127.0.0.1:{settings.port}/v1/chat/completions"
    with httpx.stream("POST", url, json=chat("to the end", stream=True)) as answer:
        lines = answer.iter_lines()
        next(lines)
        drained = threading.Thread(target=server.drain)
        drained.start()
        assert joined(sse_chunks("\n".join(lines))).endswith("o the end")
    drained.join(10)
    assert not drained.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
