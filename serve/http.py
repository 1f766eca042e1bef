"""uvicorn's HTTP protocol with an end to headers: they are read before anybody is known, so they must be few."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.api.errors import plain_error

MAX_HEAD_BYTES = 64 * 1024
"""Request line and headers together; the check is made for each piece that the socket gives."""


class BoundedHttp(HttpToolsProtocol):
    """Answers 431 and closes when a request's headers do not end within :data:`MAX_HEAD_BYTES`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._num_head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Count while the headers last."""
        if self._in_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_headers_complete(self) -> None:
        """The body begins."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next request's headers may begin."""
        self._in_head, self._num_head_bytes = True, 0
        super().on_message_complete()

    def _refuse(self) -> None:
        response = plain_error(431, f"the headers exceed {MAX_HEAD_BYTES} bytes; send fewer or shorter ones")
        headers = b"".join(b"%s: %s\r\n" % pair for pair in response.raw_headers)
        status = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
        self.transport.write(status + headers + b"\r\n" + bytes(response.body))
        self.transport.close()
