"""The chat on a WebSocket: the same requests and chunks, several turns, cancel, keys, limits, drain."""

from __future__ import annotations

import base64
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest
import support
from support import chat, eventually, joined, openai_error, running, serving, sse_chunks
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from serve.engine.base import EngineConfig
from serve.engine.echo import EchoEngine
from serve.errors import OutOfMemory

PATH = "/v1/realtime/chat"
KEY = "sk-schlüssel"


def open_socket(url: str, **options: Any) -> ClientConnection:
    return connect(url.replace("http://", "ws://") + PATH, proxy=None, open_timeout=10, **options)


@contextmanager
def talking(url: str, **options: Any) -> Iterator[ClientConnection]:
    with open_socket(url, **options) as connection:
        yield connection


def send(connection: ClientConnection, message: Any) -> None:
    connection.send(json.dumps(message))


def receive(connection: ClientConnection) -> dict[str, Any]:
    return json.loads(connection.recv(timeout=20))


def turn(connection: ClientConnection, message: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chunks of one turn, and the event that ends it."""
    send(connection, message)
    chunks: list[dict[str, Any]] = []
    while "type" not in (event := receive(connection)):
        chunks.append(event)
    return chunks, event


def test_realtime_chunks_are_those_of_the_stream(echo: support.Served) -> None:
    body = chat("hello 🧿", n=2, logprobs=True, stream_options={"include_usage": True})
    with talking(echo.url) as connection:
        chunks, end = turn(connection, body)
    streamed = sse_chunks(httpx.post(echo.url + "/v1/chat/completions", json={**body, "stream": True}).text)

    def plain(chunk: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in chunk.items() if name not in {"id", "created"}}

    def by_choice(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [
            [plain(chunk) for chunk in found if [c["index"] for c in chunk["choices"]] == at] for at in ([0], [1], [])
        ]

    assert end == {"type": "done"}
    assert by_choice(chunks) == by_choice(streamed)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_realtime_takes_several_turns_and_pings(echo: support.Served) -> None:
    with talking(echo.url) as connection:
        for text in ("first", "second", "third"):
            chunks, end = turn(connection, chat(text))
            assert (joined(chunks), end) == (text, {"type": "done"})
            send(connection, {"type": "ping"})
            assert receive(connection) == {"type": "pong"}


def test_realtime_cancel_frees_the_slot_and_the_next_turn_runs() -> None:
    with serving(EchoEngine(EngineConfig(max_batch_size=1), step_s=0.01)) as served, talking(served.url) as connection:
        send(connection, chat("x" * 4000))
        receive(connection)
        send(connection, {"type": "ping"})
        send(connection, chat("too early"))
        send(connection, {"type": "cancel"})
        events = [event for event in iter(lambda: receive(connection), {"type": "cancelled"}) if "type" in event]
        eventually(served.is_idle)

        assert [event["type"] for event in events] == ["pong", "error"]
        assert events[1]["ends_turn"] is False
        chunks, end = turn(connection, chat("next", max_tokens=2))
        assert (joined(chunks), end) == ("ne", {"type": "done"})


def test_realtime_disconnect_ends_the_generation() -> None:
    with serving(EchoEngine(EngineConfig(max_batch_size=1), step_s=0.01)) as served:
        with talking(served.url) as connection:
            send(connection, chat("x" * 4000))
            receive(connection)
        eventually(served.is_idle)
        assert served.stats().num_steps < 3000


@pytest.mark.parametrize(
    ("message", "status", "param"),
    [
        ("no json", 400, None),
        ("[]", 400, None),
        ('"a"', 400, None),
        ("null", 400, None),
        ("[" * 100_000, 400, None),
        ('{"model":"echo","messages":[{"role":"user","content":"a \\ud800 b"}]}', 400, None),
        (json.dumps(chat("a", temperature=3)), 400, "temperature"),
        (json.dumps(chat("a", stream=False)), 400, "stream"),
        (json.dumps(chat("a", use_beam_search=True)), 400, "use_beam_search"),
        (json.dumps(chat("a", model="other")), 404, "model"),
        (json.dumps(chat("x" * 9000)), 400, "messages"),
        ('{"model":"echo"}', 400, "messages"),
        ('{"type":"wat"}', 400, "type"),
        ('{"type":null}', 400, "type"),
        ('{"type":"cancel"}', 400, "type"),
    ],
)
def test_realtime_tells_errors_as_events_and_goes_on(
    echo: support.Served, message: str, status: int, param: str | None
) -> None:
    with talking(echo.url) as connection:
        connection.send(message)
        event = receive(connection)
        assert (event["type"], event["status"]) == ("error", status)
        assert openai_error({"error": event["error"]})["param"] == param

        chunks, end = turn(connection, chat("still here"))
        assert (joined(chunks), end) == ("still here", {"type": "done"})


def test_realtime_tells_a_late_error_and_goes_on() -> None:
    with (
        serving(support.scripted_engine([*b"ab", OutOfMemory("no room")])) as served,
        talking(served.url) as connection,
    ):
        chunks, end = turn(connection, chat("x"))

        assert joined(chunks) == "ab"
        assert (end["type"], end["status"], end["ends_turn"]) == ("error", 503, True)
        assert end["error"]["code"] == "out_of_memory"
        assert turn(connection, chat("x", max_tokens=2))[1] == {"type": "done"}


def test_realtime_closes_on_bytes_and_on_too_much() -> None:
    with serving(max_body_bytes=2048) as served:
        for data, code in ((b"{}", 1003), ("x" * 3000, 1009)):
            with open_socket(served.url) as connection:
                connection.send(data)
                with pytest.raises(ConnectionClosed) as closed:
                    connection.recv(timeout=10)
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == code


@pytest.fixture(scope="module")
def locked() -> Iterator[support.Served]:
    with serving(api_keys=KEY) as served:
        yield served


def protocol(key: str) -> str:
    return "trimaran.key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "options",
    [
        {"additional_headers": {"Authorization": f"Bearer {KEY}".encode().decode("latin-1")}},
        {"additional_headers": {"X-API-Key": KEY.encode().decode("latin-1")}},
        {"subprotocols": ["trimaran.chat.v1", protocol(KEY)]},
        {"subprotocols": [protocol(KEY), "trimaran.chat.v1"], "origin": "https://app.example"},
    ],
)
def test_realtime_takes_the_key_from_headers_or_a_subprotocol(locked: support.Served, options: dict[str, Any]) -> None:
    with talking(locked.url, **options) as connection:
        assert connection.subprotocol == ("trimaran.chat.v1" if "subprotocols" in options else None)
        assert turn(connection, chat("a"))[1] == {"type": "done"}


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (PATH, {}),
        (PATH + "?api_key=sk", {}),
        (PATH, {"additional_headers": {"X-API-Key": "wrong"}}),
        (PATH, {"subprotocols": ["trimaran.chat.v1", protocol("wrong")]}),
        (PATH, {"subprotocols": ["trimaran.key."]}),
        ("/nope", {}),
        ("/health", {}),
    ],
)
def test_realtime_refuses_a_handshake_without_a_key(locked: support.Served, path: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidStatus) as refused:
        connect(locked.url.replace("http://", "ws://") + path, proxy=None, open_timeout=10, **options)

    response = refused.value.response
    if path == "/health":  # open for HTTP, and no WebSocket
        assert response.status_code == 403
        return
    assert response.status_code == 401
    assert openai_error(json.loads(response.body or b""))["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_realtime_without_keys_refuses_pages_of_other_origins(echo: support.Served) -> None:
    with talking(echo.url, origin=echo.url) as connection:
        assert turn(connection, chat("a"))[1] == {"type": "done"}
    with pytest.raises(InvalidStatus) as refused:
        open_socket(echo.url, origin="https://evil.example")
    assert refused.value.response.status_code == 403


def test_realtime_counts_each_turn_against_its_callers_limits() -> None:
    """With what the same caller sends as plain requests; a refused turn leaves the connection usable."""
    with serving(limit_requests_per_minute=2) as served, talking(served.url) as connection:
        assert httpx.post(served.url + "/v1/chat/completions", json=chat("plain")).status_code == 200
        assert turn(connection, chat("first"))[1] == {"type": "done"}
        _, refused = turn(connection, chat("second"))
        send(connection, {"type": "ping"})
        assert receive(connection) == {"type": "pong"}

    assert (refused["status"], openai_error({"error": refused["error"]})["code"]) == (429, "rate_limit_exceeded")


def test_realtime_connection_ends_with_the_drain() -> None:
    slow = "from serve.engine import echo; echo.EchoEngine.__init__.__kwdefaults__['step_s'] = 0.01"
    with running(before=slow) as server, open_socket(server.url) as idle, open_socket(server.url) as busy:
        send(busy, chat("x" * 100))
        receive(busy)
        server.process.terminate()

        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(timeout=10)
        events = list(iter(lambda: receive(busy), {"type": "done"}))
        assert joined(events).count("x") >= 99
        with pytest.raises(ConnectionClosed) as closed_later:
            busy.recv(timeout=10)
        for found in (closed, closed_later):
            assert found.value.rcvd is not None
            assert found.value.rcvd.code == 1012
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log


def test_realtime_logs_each_turn_and_no_text_nor_key() -> None:
    with running(SERVE_API_KEYS="sk-secret") as server:
        with talking(server.url, subprotocols=["trimaran.chat.v1", protocol("sk-secret")]) as connection:
            for text in ("geheim", "privat"):
                turn(connection, chat(text))
        eventually(lambda: server.log.count(PATH) >= 3)
        log = server.log

    assert len(re.findall(r'"status": 200', log)) == 2
    assert len(re.findall(r'"status": 101', log)) == 1
    assert not re.search("geheim|privat|sk-secret|" + re.escape(protocol("sk-secret")), log)


def test_realtime_is_no_plain_route(echo: support.Served) -> None:
    assert httpx.get(echo.url + PATH).status_code == 404
    with socket.create_connection(("127.0.0.1", echo.port), timeout=10) as client:
        client.sendall(f"GET {PATH} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n".encode())
        assert client.makefile("rb").readline().split()[1] in {b"400", b"426"}
