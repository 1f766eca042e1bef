"""The web side: HTTP and WebSockets to the ASGI messages that Modal sends through its control plane."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from modal_proto import api_pb2 as pb

from trimaran.emulate.modal.calls import Call, Calls

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

KEPT = ("type", "http_version", "method", "scheme", "path", "query_string", "headers", "client", "subprotocols")


class Gateway:
    """An ASGI app in front of one web function, ``method`` of its class; and the place for large uploads."""

    def __init__(self, plane: Calls) -> None:
        self._plane = plane
        self.method: str | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] == "http" and scope["method"] == "PUT" and scope["path"].startswith("/blobs/"):
            await self._keep_upload(scope, receive, send)
        elif scope["type"] == "http" and self.method is None:
            await _answer(send, 404, b"modal-http: app for invoked web endpoint is stopped")
        elif scope["type"] in ("http", "websocket") and self.method is not None:
            await self._relay(self.method, scope, receive, send)

    async def _keep_upload(self, scope: Message, receive: Receive, send: Send) -> None:
        md5 = hashlib.md5(usedforsecurity=False)
        with self._plane.store.upload(scope["path"].removeprefix("/blobs/")).open("wb") as file:
            more = True
            while more:
                message = await receive()
                more = message.get("more_body", False)
                md5.update(message.get("body", b""))
                file.write(message.get("body", b""))
        await _answer(send, 200, b"", (b"etag", md5.hexdigest().encode()))

    async def _relay(self, method: str, scope: Message, receive: Receive, send: Send) -> None:
        first = dict(await receive())
        call = self._plane.begin(method, {key: scope[key] for key in KEPT if key in scope})
        call.to_app.put_nowait(first)
        pump = asyncio.create_task(_pump(call, receive))
        has_begun = False
        try:
            while not isinstance(message := await call.from_app.get(), pb.GenericResult):
                has_begun = True
                # A client that is gone cannot be told anything; the app hears of it through the pump.
                with contextlib.suppress(OSError):
                    await send(message)
            if not has_begun and scope["type"] == "http":
                await _answer(send, 500, message.exception.encode() or b"modal-http: the call ended without an answer")
        finally:
            pump.cancel()
            call.to_app.put_nowait(None)


async def _pump(call: Call, receive: Receive) -> None:
    while True:
        message = dict(await receive())
        call.to_app.put_nowait(message)
        if message["type"].endswith("disconnect"):
            return


async def _answer(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
