"""Where a request ends: what a proxy in front reads otherwise than the server is how one request hides in another."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest
from attack import COMPLETIONS, KEY, OWN, Target
from support import openai_error

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


@pytest.fixture(autouse=True)
def _plain(target: Target) -> None:
    if target.url.startswith("https"):
        pytest.skip("raw bytes are sent to plain HTTP only")


def answers(target: Target, *pieces: bytes) -> bytes:
    """All that is sent back, until the server closes."""
    answer = b""
    with socket.create_connection(target.address, 10) as client, contextlib.suppress(OSError):
        client.settimeout(10)
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.02)
        while piece := client.recv(65536):
            answer += piece
    return answer


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_refused_and_nothing_behind_it_is_read(target: Target, name: str) -> None:
    answer = answers(target, MALFORMED[name] + b"GET /health HTTP/1.1\r\nHost: smuggled\r\n\r\n")

    assert b"HTTP/1.1 200" not in answer
    if OWN:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 "), answer
        assert b"connection: close" in head
        assert openai_error(json.loads(body))["type"] == "invalid_request_error"


@pytest.mark.parametrize("after", [b"1;", b"0\r\nX: ", b"2\r\n{}\r\n0\r\n"], ids=["extension", "trailer", "trailers"])
def test_what_is_around_chunks_is_bounded(target: Target, after: bytes) -> None:
    """A parser keeps a trailer until it ends, and copies all of it for each piece, for somebody without a key."""
    line = b"X-A: b\r\n" if after.endswith(b"\n") else b"a" * 8

    assert is_cut_off(target, CHUNKED + b"\r\n" + after, line * 16_000)


def is_cut_off(target: Target, head: bytes, piece: bytes) -> bool:
    """Whether the server closes, in place of reading on and on."""
    with socket.create_connection(target.address, 10) as client:
        client.settimeout(5)
        try:
            client.sendall(head)
            for _ in range(400):
                client.sendall(piece)
        except ConnectionError:
            return True
        except TimeoutError:  # it reads too slowly: that is the fault
            return False
    return False


@pytest.mark.parametrize("wish", [b"h2c", b"TLS/1.2", b"websocket"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_upgrade_that_is_not_granted_changes_nothing(target: Target, wish: bytes, is_chunked: bool) -> None:
    """Java's own HTTP client asks for h2c each time, and no POST becomes a WebSocket: the body stays its body."""
    body = json.dumps(target.chat("GET /smuggled HTTP/1.1") | {"max_tokens": 32}).encode()
    framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    head = (
        b"POST %s HTTP/1.1\r\nHost: a\r\nX-API-Key: %s\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAAB\r\nContent-Type: application/json\r\n%s\r\n\r\n"
        % (COMPLETIONS.encode(), KEY.encode(), wish, framing)
    )
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    for pieces in ((head + sent + last,), (head, sent, last), (head[:70], head[70:] + sent[:9], sent[9:], last)):
        answer = answers(target, *pieces)
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2, answer
        assert not OWN or b'"content":"GET /smuggled HTTP/1.1"' in answer


@pytest.mark.parametrize("header", [b"X: " + b"a" * 20_000, b"\r\n".join(b"X-%d: a" % at for at in range(500))])
def test_handshake_that_cannot_be_read_is_refused(target: Target, header: bytes) -> None:
    """It used to be left without an answer and without an end."""
    wish = b"Host: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    answer = answers(target, b"GET /v1/realtime/chat HTTP/1.1\r\n" + wish + header + b"\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("place", [b"127.0.0.1:22", b"/v1/models"])
def test_server_is_no_proxy(target: Target, place: bytes) -> None:
    assert answers(target, b"CONNECT %s HTTP/1.1\r\nHost: a\r\n\r\n" % place).startswith(b"HTTP/1.1 4")
