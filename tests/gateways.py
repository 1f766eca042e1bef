"""A gateway, and scripted servers to put behind it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import support
from support import Served


@contextmanager
def gateway(url: str, **settings: Any) -> Iterator[tuple[Served, httpx.Client]]:
    """A gateway to ``url``, and a client of it."""
    given = {"engine": "remote", "remote_url": url, **settings}
    with support.serving(**given) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        yield served, client


@contextmanager
def scripted(*answers: bytes) -> Iterator[str]:
    """A server that gives each connection the next of ``answers``; the last one again and again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        is_over = threading.Event()

        def serve() -> None:
            left = list(answers)
            while not is_over.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.recv(65536)
                    connection.sendall(left.pop(0) if len(left) > 1 else left[0])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            is_over.set()
            thread.join()


def response(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
