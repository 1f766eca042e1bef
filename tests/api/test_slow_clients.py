"""Clients that send or read too slowly lose their connection; nobody else notices."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time

import pytest
from support import chat, eventually, openai_error, running

SHORT = """
import serve.http, serve.api.middleware
serve.http.FIRST_BYTE_S, serve.http.HEAD_TIMEOUT_S, serve.http.STALLED_READER_S = 0.6, 0.4, 0.5
serve.http.LATE_BODY_S = 0.5
serve.api.middleware.BODY_TIMEOUT_S = 0.5
"""
BODY = json.dumps(chat("a")).encode()


def connect(url: str) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 10)
    client.settimeout(15)
    return client


def everything(client: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            answer += piece
    return answer


def post_head(length: int) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"], ids=["first", "second"])
def test_headers_that_never_end_get_408(before: bytes) -> None:
    with running(before=SHORT) as server, connect(server.url) as client:
        if before:
            client.sendall(before)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        with contextlib.suppress(ConnectionError):  # a byte now and then does not help
            for _ in range(3):
                time.sleep(0.2)
                client.sendall(b"a")
        answer = everything(client)

    status, _, rest = answer.partition(b"HTTP/1.1 ")[2].partition(b" ")
    assert status == b"408", answer
    openai_error(json.loads(rest.partition(b"\r\n\r\n")[2]))


def test_connections_that_say_nothing_are_closed() -> None:
    with running(before=SHORT) as server, connect(server.url) as client:
        assert everything(client) == b""


def test_body_that_never_ends_gets_408_and_the_server_lives() -> None:
    with running(before=SHORT) as server:
        with connect(server.url) as client:
            client.sendall(post_head(len(BODY)) + BODY[:-1])
            answer = client.makefile("rb")
            head = b"".join(iter(answer.readline, b"\r\n"))
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = answer.read(int(length[1])) if length else b""
        assert head.startswith(b"HTTP/1.1 408 "), head
        assert openai_error(json.loads(body))["code"] == "request_timeout"
        with connect(server.url) as client:
            client.sendall(post_head(len(BODY)) + BODY)
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_body_that_trickles_on_after_the_answer_is_not_waited_for() -> None:
    """Each byte used to take away the only timer; without a key a connection could be held for ever."""
    with running(before=SHORT, SERVE_API_KEYS="sk-key", SERVE_MAX_BODY_BYTES="1024") as server:
        key = b"X-API-Key: sk-key\r\nContent-Length"
        for head, status in ((post_head(10**6), b"401"), (post_head(10**6).replace(b"Content-Length", key), b"413")):
            with connect(server.url) as client:
                client.sendall(head)
                began = time.monotonic()
                with contextlib.suppress(ConnectionError):
                    while time.monotonic() - began < 5 and not client.sendall(b"a"):
                        time.sleep(0.05)
                assert time.monotonic() - began < 5
                assert everything(client).startswith(b"HTTP/1.1 " + status) or status == b"401"  # a reset may outrun it


def test_connection_is_closed_when_nothing_follows_a_late_body() -> None:
    short = "import serve.server; serve.server.IDLE_CONNECTION_S = 0.5"
    with running(before=short, SERVE_API_KEYS="sk-key") as server, connect(server.url) as client:
        client.sendall(post_head(2))
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
        client.sendall(b"{}")
        assert everything(client).count(b"HTTP/1.1 ") == 0  # until it is closed, which is soon


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux ends connections of stalled readers")
def test_stream_of_a_reader_that_stalls_is_given_up() -> None:
    """Its socket fills up, nothing is taken from it, and the kernel ends the connection."""
    body = json.dumps(chat("x" * 4000, stream=True, n=8)).encode()  # 6 MB, more than socket buffers hold
    with running(before=SHORT) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        client.sendall(post_head(len(body)) + body)
        eventually(lambda: '"route": "/v1/chat/completions"' in server.log, timeout_s=40)  # its end is logged
        assert b"[DONE]" not in everything(client)
