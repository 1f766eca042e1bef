"""``WebSocket /v1/realtime/chat``: chat completions, one after the other, on one connection.

The client sends a chat completion's request as one text message and gets its chunks back, each as one text message.
Any other message is a :class:`~serve.api.schemas.realtime.Control` or an event of the same module.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from fastapi import APIRouter, WebSocket
from pydantic_core import to_json
from starlette.websockets import WebSocketState

from serve.api.auth import REALTIME_PROTOCOL, offered_protocols
from serve.api.chat import start_chat
from serve.api.chat_shape import ChatShape
from serve.api.errors import error_body, show, status_of
from serve.api.fields import check_fields, validated
from serve.api.heading import Heading
from serve.api.limits import Admission
from serve.api.middleware import CLIENT_CLOSED, new_request_id
from serve.api.models import check_model
from serve.api.routing import parse_json
from serve.api.schemas.chat import ChatCompletionRequest
from serve.api.schemas.realtime import Cancelled, Done, ErrorEvent, Pong
from serve.errors import GenerationFailed, InvalidRequest, ServeError
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord
from serve.settings import Settings

logger = logging.getLogger(__name__)

UNSUPPORTED_DATA, TOO_BIG, RESTARTING = 1003, 1009, 1012
"""Close codes of RFC 6455 and its registry."""

_DONE = to_json(Done())

router = APIRouter()


@router.websocket("/v1/realtime/chat")
async def realtime_chat(socket: WebSocket) -> None:
    """Serve one connection until it closes, or until the server drains and no turn is running."""
    protocol = REALTIME_PROTOCOL if REALTIME_PROTOCOL in offered_protocols(socket.headers) else None
    await socket.accept(subprotocol=protocol)
    await _Connection(socket).serve()


class _Connection:
    """One connection: at most one turn at a time, while messages are still read."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._settings: Settings = socket.app.state.settings
        self._lifecycle: Lifecycle = socket.app.state.lifecycle
        self._record: RequestRecord = socket.scope["trimaran.record"]
        self._turn: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Read messages and run turns; whatever ends it, nothing is generated for nobody."""
        draining = asyncio.create_task(self._lifecycle.drain_began.wait())
        message = asyncio.create_task(self._socket.receive())
        try:
            while True:
                waiting = {message, draining} if self._turn is None else {message, self._turn}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._turn is not None and self._turn.done():
                    turn, self._turn = self._turn, None
                    await turn
                if message.done():
                    if not await self._take(message.result()):
                        return
                    message = asyncio.create_task(self._socket.receive())
                elif draining.done() and self._turn is None:
                    await self._close(RESTARTING, "the server is shutting down; connect again")
                    return
        finally:
            message.cancel()
            draining.cancel()
            await self._cancel()

    async def _take(self, message: Any) -> bool:
        """Act on one message; False when the connection is over."""
        if message["type"] == "websocket.disconnect":
            return False
        text: str | None = message.get("text")
        if text is None:
            await self._close(UNSUPPORTED_DATA, "send JSON as text, not bytes")
            return False
        data = text.encode("utf-8", errors="surrogatepass")
        if len(data) > self._settings.max_body_bytes:
            await self._close(TOO_BIG, f"the message exceeds {self._settings.max_body_bytes} bytes")
            return False
        try:
            await self._obey(parse_json(data))
        except ServeError as error:
            await self._send_error(error, ends_turn=False)
        return True

    async def _obey(self, message: Any) -> None:
        fields = cast("dict[str, Any]", message) if isinstance(message, dict) else {}
        match fields.get("type"):
            case None if "type" not in fields:
                if self._turn is not None:
                    raise InvalidRequest('a turn is running; wait for its end, or send {"type":"cancel"} first')
                self._turn = asyncio.create_task(self._run(message))
            case "ping":
                await self._send(to_json(Pong()))
            case "cancel":
                if self._turn is None:
                    raise InvalidRequest("there is no turn to cancel", param="type")
                await self._cancel()
                await self._send(to_json(Cancelled()))
            case other:
                raise InvalidRequest(f"type: there is cancel and ping, not {show(other)}", param="type")

    async def _cancel(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.cancel()
            await asyncio.wait({turn})

    async def _run(self, message: Any) -> None:
        """One turn, with a record of its own."""
        record = RequestRecord(
            request_id=new_request_id(),
            method=self._record.method,
            route=self._record.route,
            caller=self._record.caller,
            key_id=self._record.key_id,
            is_stream=True,
            endpoint=self._record.route,
            machine=self._record.machine,
            deadline_s=self._record.deadline_s,
        )
        try:
            with await Admission.of(self._socket.app.state.limiter, record):
                await self._generate(message, record)
            record.status = 200
        except ServeError as error:
            record.status, record.error_code = status_of(error), error.code
            await self._send_error(error, ends_turn=True)
        except Exception:
            logger.exception("Unexpected error in turn %s", record.request_id)
            record.status = 500
            await self._send_error(GenerationFailed("internal error"), ends_turn=True)
        finally:
            if record.status is None:  # cancelled
                record.status = CLIENT_CLOSED
            self._socket.scope["trimaran.end"](record)

    async def _generate(self, message: Any, record: RequestRecord) -> None:
        body = _validated(message)
        check_model(body.model, self._settings)
        body.stream = True
        check_fields(body, self._settings)
        record.model = self._settings.served_name
        choices, readers = await start_chat(body, self._lifecycle, record)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        heading = Heading.new("chatcmpl-", self._settings)
        shape = ChatShape(heading, readers, include_usage=include_usage, frame=bytes, end=_DONE)
        try:
            while events := await choices.next():
                for index, event in events:
                    if event.error is not None:
                        raise event.error
                    for piece in shape.frames(index, event):
                        await self._send(piece)
        finally:
            choices.close()

    async def _send_error(self, error: ServeError, *, ends_turn: bool) -> None:
        event = ErrorEvent(error=error_body(error), status=status_of(error), ends_turn=ends_turn)
        await self._send(to_json(event))

    async def _send(self, data: bytes) -> None:
        if self._socket.application_state is WebSocketState.CONNECTED:
            await self._socket.send_text(data.decode())

    async def _close(self, code: int, reason: str) -> None:
        await self._socket.close(code, reason)


def _validated(message: Any) -> ChatCompletionRequest:
    body = validated(ChatCompletionRequest, message)
    if body.stream is False:
        raise InvalidRequest("stream is false, but this connection only streams; leave it out", param="stream")
    return body
