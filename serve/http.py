"""uvicorn's HTTP protocol with an end to headers, which are read before anybody is known, and to stalled readers."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers together; the check is made for each piece that the socket gives."""


FIRST_BYTE_S = 75.0
"""Seconds that a new connection may stay silent: load balancers open some in advance, and close theirs after 60."""

HEAD_TIMEOUT_S = 20.0
"""Seconds from the first byte of a request's headers to their last."""

STALLED_READER_S = 60.0
"""After so long in which a client took nothing of what was sent, Linux ends the connection, and we its request."""


class BoundedHttp(HttpToolsProtocol):
    """Closes when headers do not end within :data:`MAX_HEAD_BYTES` (431) or :data:`HEAD_TIMEOUT_S` (408)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        connection: socket.socket | None = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX and hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_READER_S * 1000))
        self._head_timer = self.loop.call_later(FIRST_BYTE_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count, and look at the clock, while the headers last."""
        if self._in_head:
            if not self._num_head_bytes:
                self._stop_timer()
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"the headers exceed {MAX_HEAD_BYTES} bytes; send fewer or shorter ones"
            self._refuse(b"431 Request Header Fields Too Large", 431, message)

    def on_headers_complete(self) -> None:
        """The body begins."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next request's headers may begin."""
        self._in_head, self._num_head_bytes = True, 0
        super().on_message_complete()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self._num_head_bytes and not self.transport.is_closing():
            message = f"the headers did not end within {HEAD_TIMEOUT_S:g} s; send them at once"
            self._refuse(b"408 Request Timeout", 408, message)
        self.transport.close()

    def _refuse(self, status_line: bytes, status: int, message: str) -> None:
        from serve.api.errors import plain_error  # noqa: PLC0415 - with FastAPI, and the port opens before that

        response = plain_error(status, message)
        headers = b"".join(b"%s: %s\r\n" % pair for pair in response.raw_headers)
        head = b"HTTP/1.1 " + status_line + b"\r\nconnection: close\r\n"
        self.transport.write(head + headers + b"\r\n" + bytes(response.body))
        self.transport.close()
