"""Headers are read before anybody is known: they must end."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest
from support import chat, openai_error, running

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


POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n"
MALFORMED = {
    "length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}}",
    "a list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}",
    "a signed length": POST + b"Content-Length: +2\r\n\r\n{}",
    "a negative length": POST + b"Content-Length: -2\r\n\r\n{}",
    "a length beyond all numbers": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}",
    "an unknown encoding": POST + b"Transfer-Encoding: chunked, x\r\n\r\n0\r\n\r\n",
    "a disguised encoding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "a folded line": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
    "bare line feeds": b"GET / HTTP/1.1\nHost: a\n\n",
    "a bare carriage return": b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
    "a zero in a value": b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n",
    "a negative chunk": CHUNKED + b"\r\n-1\r\n",
    "a chunk beyond all numbers": CHUNKED + b"\r\n" + b"F" * 20 + b"\r\n",
    "a chunk that is longer": CHUNKED + b"\r\n1\r\nabc\r\n0\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
    "HTTP/2 at once": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}
"""What a proxy may read otherwise than the server behind it: each is refused, and nothing after it is read."""


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Of a server in a process, whose log must stay without a traceback."""
    with running() as server:
        yield "127.0.0.1", int(server.url.rpartition(":")[2])
        assert "Traceback" not in server.log


def answers(address: tuple[str, int], *pieces: bytes) -> bytes:
    """All that is sent back, until the server closes."""
    answer = b""
    with socket.create_connection(address, 10) as client, contextlib.suppress(ConnectionError):
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.02)
        while piece := client.recv(65536):
            answer += piece
    return answer


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_gets_400_and_nothing_behind_it_is_read(address: tuple[str, int], name: str) -> None:
    answer = answers(address, MALFORMED[name] + b"GET /health HTTP/1.1\r\nHost: smuggled\r\n\r\n")

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), answer
    assert answer.count(b"HTTP/1.1 ") == 1 + body.count(b"valid HTTP/1.1 ")
    assert openai_error(json.loads(body))["type"] == "invalid_request_error"


@pytest.mark.parametrize("after", [b"1;", b"0\r\nX: ", b"2\r\n{}\r\n0\r\n"], ids=["extension", "trailer", "trailers"])
def test_what_is_around_chunks_is_bounded(address: tuple[str, int], after: bytes) -> None:
    """A parser keeps a trailer until it ends, and copies all of it for each piece, for somebody without a key."""
    head = b"POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    line = b"X-A: b\r\n" if after.endswith(b"\n") else b"a" * 8

    began = time.monotonic()
    answers(address, head + after, *[line * 8000] * 20)
    assert time.monotonic() - began < 5, "it was read to its end"


@pytest.mark.parametrize("wish", [b"h2c", b"TLS/1.2", b"websocket"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_upgrade_that_is_not_granted_changes_nothing(address: tuple[str, int], wish: bytes, is_chunked: bool) -> None:
    """Java's own HTTP client asks for h2c each time, and no POST becomes a WebSocket: the body stays its body."""
    body = json.dumps(chat("GET /smuggled HTTP/1.1")).encode()
    framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAAB\r\nContent-Type: application/json\r\n%s\r\n\r\n" % (wish, framing)
    )
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    for pieces in ((head + sent + last,), (head, sent, last), (head[:70], head[70:] + sent[:9], sent[9:], last)):
        answer = answers(address, *pieces)
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2, answer
        assert b'"content":"GET /smuggled HTTP/1.1"' in answer


@pytest.mark.parametrize("header", [b"X: " + b"a" * 20_000, b"\r\n".join(b"X-%d: a" % at for at in range(500))])
def test_handshake_that_websockets_cannot_read_is_refused(address: tuple[str, int], header: bytes) -> None:
    """It used to be left without an answer and without an end."""
    wish = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MTIzNDU2Nzg5\r\n"
    )
    answer = answers(address, b"GET /v1/realtime/chat HTTP/1.1\r\nHost: a\r\n" + wish + header + b"\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 400 ")
    openai_error(json.loads(answer.partition(b"\r\n\r\n")[2]))


def test_connect_is_refused(address: tuple[str, int]) -> None:
    for target in (b"a:80", b"/v1/models"):
        assert answers(address, b"CONNECT %s HTTP/1.1\r\nHost: a\r\n\r\n" % target).startswith(b"HTTP/1.1 400 ")


def test_headers_that_stop_just_beyond_the_limit_get_431() -> None:
    with running() as server, socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * (MAX_HEAD_BYTES + 1000))
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 431 ")
        openai_error(json.loads(answer.partition(b"\r\n\r\n")[2]))
