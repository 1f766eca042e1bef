"""Headers are read before anybody is known: they must end."""

from __future__ import annotations

import contextlib
import json
import socket

import pytest
from support import openai_error, running

from serve.http import MAX_HEAD_BYTES


@pytest.mark.parametrize(
    "head",
    [
        b"X-Long: " + b"a" * 1_000_000,
        b"\r\n".join(b"X-%d: y" % number for number in range(100_000)),
        b"Authorization: Bearer " + b"k" * 500_000,
    ],
)
def test_headers_without_end_are_refused_and_the_server_lives(head: bytes) -> None:
    with running() as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        answer = b""
        with socket.create_connection(address, 10) as client, contextlib.suppress(ConnectionError):
            # We may be refused while we still send, and a reset may outrun the answer.
            client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n" + head)
            while piece := client.recv(65536):
                answer += piece
        assert not answer or answer.startswith(b"HTTP/1.1 431 ")
        if answer:
            openai_error(json.loads(answer.partition(b"\r\n\r\n")[2]))
        with socket.create_connection(address, 10) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Fine: " + b"a" * 8000 + b"\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_headers_that_stop_just_beyond_the_limit_get_431() -> None:
    with running() as server, socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * (MAX_HEAD_BYTES + 1000))
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 431 ")
        openai_error(json.loads(answer.partition(b"\r\n\r\n")[2]))
