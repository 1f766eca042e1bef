"""uvicorn's HTTP protocol with an end to headers, which are read before anybody is known, and to stalled readers."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers together, or what comes between pieces of a body; checked for each piece of the socket's."""

FIRST_BYTE_S = 75.0
"""Seconds that a new connection may stay silent: load balancers open some in advance, and close theirs after 60."""

HEAD_TIMEOUT_S = 20.0
"""Seconds from the first byte of a request's headers to their last."""

LATE_BODY_S = 120.0
"""Seconds from an answer to the end of a body that it did not wait for: a client must not trickle on for ever."""

STALLED_READER_S = 60.0
"""After so long in which a client took nothing of what was sent, Linux ends the connection, and we its request."""


class BoundedHttp(HttpToolsProtocol):
    """Closes when headers do not end within :data:`MAX_HEAD_BYTES` (431) or :data:`HEAD_TIMEOUT_S` (408).

    What is around a body's bytes, chunks' extensions and trailers, is bounded likewise.  An upgrade to anything but a
    WebSocket is ignored, as HTTP wants it: the parser alone would take the request's body for another request.
    """

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
        """Count what is no body, and look at the clock while the headers last."""
        self._unset_keepalive_if_required()
        if self._in_head and not self._num_head_bytes:
            self._stop_timer()
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)
        self._num_head_bytes += len(data)
        self._parse(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"the headers exceed {MAX_HEAD_BYTES} bytes; send fewer or shorter ones"
            self._refuse(b"431 Request Header Fields Too Large", 431, message)

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("this is no valid HTTP/1.1 request")
        except httptools.HttpParserUpgrade as found:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
                # Where the handshake cannot be read (a line beyond websockets' own limits), nobody would ever answer.
                if not getattr(self.transport.get_protocol(), "handshake_initiated", True):
                    self.send_400_response("this WebSocket's handshake has too many headers, or too long ones")
            else:
                self._parse_without_upgrade(data[found.args[0] :])

    def _should_upgrade(self) -> bool:
        """Only what can be a WebSocket's handshake is handed on as one."""
        return self.parser.get_method() == b"GET" and super()._should_upgrade()

    def _parse_without_upgrade(self, rest: bytes) -> None:
        """Begin the request again without its wish, since the parser has stopped before the body."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            self.send_400_response("this server is no proxy")
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
        for name, value in self.headers:
            if name == b"connection":
                kept = [token for token in value.split(b",") if token.strip().lower() != b"upgrade"]
                lines.append(b"connection: " + b",".join(kept))
            elif name != b"upgrade":
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self._parse(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    @property
    def _latest(self) -> RequestResponseCycle | None:
        """The request that came last; uvicorn's own type leaves out that there may be none yet."""
        return self.cycle

    @property
    def _is_unwanted_upgrade(self) -> bool:
        return self.parser.should_upgrade() and not self._should_upgrade()

    def on_headers_complete(self) -> None:
        """The body begins."""
        if self._is_unwanted_upgrade:
            return
        self._in_head, self._num_head_bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body, and not of what is around it."""
        self._num_head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next request's headers may begin."""
        if self._is_unwanted_upgrade:
            return
        self._in_head, self._num_head_bytes = True, 0
        super().on_message_complete()
        # An answer that came first has left no timer of uvicorn's: each piece of the body took it away.
        if self._latest is not None and self._latest.response_complete and not self.parser.should_upgrade():
            self._stop_timer()
            self._head_timer = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    def on_response_complete(self) -> None:
        """The answer is sent; the body may still come, and is thrown away."""
        super().on_response_complete()
        if not self._in_head and self.cycle.response_complete and self._head_timer is None:
            self._head_timer = self.loop.call_later(LATE_BODY_S, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(b"400 Bad Request", 400, f"{msg}; nothing after it is read")

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
        """Answer and close; in the middle of another answer nothing more can be said."""
        if self._latest is None or self._latest.response_complete or not self._latest.response_started:
            from serve.api.errors import plain_error  # noqa: PLC0415 - with FastAPI, and the port opens before that

            response = plain_error(status, message)
            headers = b"".join(b"%s: %s\r\n" % pair for pair in response.raw_headers)
            head = b"HTTP/1.1 " + status_line + b"\r\nconnection: close\r\n"
            self.transport.write(head + headers + b"\r\n" + bytes(response.body))
        self.transport.close()
