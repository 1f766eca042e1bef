"""What every request passes, in pure ASGI so that streams and disconnects stay visible.

From the outside in: :class:`Boundary` (request id, HEAD, last resort for exceptions, one log line),
:class:`Gate` (keys), :class:`serve.api.limits.Limits` (allowances), :class:`BodyLimit`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.auth import OPEN_PATHS, TRUSTED_CALLER, Door, challenge
from serve.api.errors import error_response, plain_error, speaks_anthropic
from serve.errors import (
    AuthenticationError,
    IssuerUnavailable,
    PermissionDenied,
    RequestTimeout,
    RequestTooLarge,
)
from serve.keys import Identity
from serve.machine_time import MachineTime
from serve.observe import RequestRecord
from serve.setting_values import is_address

logger = logging.getLogger(__name__)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
TRACE_HEADERS = ("traceparent", "tracestate")
SWITCHED = 101
CLIENT_CLOSED = 499
"""Logged when the client left before an answer; never sent."""

MAX_DISCARDED_BYTES = 64 * 2**20
"""An oversized body is read to its end up to here, so that the client sees the 413 and keeps its connection."""

BODY_TIMEOUT_S = 120.0
"""Seconds for a request's body; the largest one that is allowed by default then needs 70 kB/s."""


class Boundary:
    """The outermost layer: an exception that gets here is answered and swallowed, and the connection lives.

    Args:
        app: What it surrounds.
        sinks: Called with the record of each request that ended, health and the playground left out.
        machine: Measures what of the machine each request had.
        deadline_s: Seconds that each request may take; None: no bound.
    """

    def __init__(
        self,
        app: ASGIApp,
        sinks: Sequence[Callable[[RequestRecord], object]],
        machine: MachineTime | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self._app = app
        self._sinks = sinks
        self._common: dict[str, Any] = {"machine": machine, "deadline_s": deadline_s}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, whatever happens inside."""
        if scope["type"] == "websocket":
            await self._serve_socket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope)
        wanted = given.get("x-request-id", "")
        request_id = wanted if _SANE_REQUEST_ID.fullmatch(wanted) else new_request_id()
        record = RequestRecord(request_id=request_id, method=scope["method"], route=scope["path"], **self._common)
        record.trace_headers = {name: given[name] for name in TRACE_HEADERS if name in given}
        is_head = scope["method"] == "HEAD"
        method = "GET" if is_head else scope["method"]
        scope = {**scope, "method": method, "trimaran.record": record, "trimaran.end": self._end}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["server-timing"] = record.server_timing()
                if speaks_anthropic(scope["path"]):
                    headers["request-id"] = request_id
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:  # while the body was read; nobody is there to be answered
            pass
        except Exception:
            logger.exception("Unexpected error in request %s", request_id)
            if record.status is not None:  # too late for another status
                raise
            response = plain_error(500, f"internal error; tell the operator the request id {request_id}", scope=scope)
            await response(scope, receive, send_with_id)
        finally:
            if record.status is None:
                record.status = CLIENT_CLOSED
            record.endpoint = getattr(scope.get("route"), "path", None)
            if scope["path"] not in OPEN_PATHS and not record.goes_on:
                self._end(record)

    def _end(self, record: RequestRecord) -> None:
        record.end_work()
        for sink in self._sinks:
            sink(record)

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, from its handshake to its end, as one record; its turns have records of their own."""
        record = RequestRecord(request_id=new_request_id(), method="WEBSOCKET", route=scope["path"], **self._common)

        async def send_noting(message: Message) -> None:
            if message["type"] == "websocket.accept":
                record.status = SWITCHED
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            elif message["type"] == "websocket.http.response.start":
                record.status = message["status"]
            await send(message)

        scope = {**scope, "trimaran.record": record, "trimaran.end": self._end}
        try:
            await self._app(scope, receive, send_noting)
        except Exception:
            logger.exception("Unexpected error in connection %s", record.request_id)
            if record.status == SWITCHED:
                with suppress(Exception):  # it may be closed already
                    await send({"type": "websocket.close", "code": 1011, "reason": "internal error"})
            else:
                await refuse_socket(plain_error(500, "internal error"), scope, receive, send_noting)
        finally:
            if record.status is None:  # closed in place of an answer
                record.status = 403
            record.endpoint = getattr(scope.get("route"), "path", None)
            self._end(record)


async def refuse_socket(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a WebSocket's handshake with an HTTP error; servers that cannot close it, which is a 403."""
    if "websocket.http.response" in scope.get("extensions", {}):
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": "refused"})


def new_request_id() -> str:
    """Names a request whose client did not."""
    return f"req_{uuid.uuid4().hex}"


class Gate:
    """Turns requests without an accepted key or token away, before anything of them is read."""

    def __init__(self, app: ASGIApp, door: Door, *, only_local_names: bool = True) -> None:
        self._app = app
        self._door = door
        self._only_local_names = only_local_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or answer 401 or 403."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers, is_socket = Headers(scope=scope), scope["type"] == "websocket"
        try:
            trusted: str | None = scope.get(TRUSTED_CALLER)
            identity = Identity(trusted) if trusted else await self._door.identify(scope["path"], headers)
            if self._door.is_open and not trusted:
                if self._only_local_names and scope["path"] not in OPEN_PATHS:
                    _refuse_foreign_name(headers)
                if is_socket:
                    _refuse_foreign_page(headers)
        except (AuthenticationError, PermissionDenied, IssuerUnavailable) as error:
            response = error_response(error, scope)
            if isinstance(error, AuthenticationError):
                response.headers["www-authenticate"] = challenge(scope["path"])
            if is_socket:
                await refuse_socket(response, scope, receive, send)
            else:
                await response(scope, receive, send)
            return
        if (record := scope.get("trimaran.record")) is not None:
            record.caller, record.key_id = identity.caller, identity.key_id
        await self._app(scope, receive, send)


def _refuse_foreign_name(headers: Headers) -> None:
    """Without keys, a page whose own name was made to lead to this machine (DNS rebinding) would be of this origin.

    Nobody can do that to an address in numbers, or to a name without a dot.

    Raises:
        PermissionDenied: the request was sent to a name that others may own.
    """
    with suppress(ValueError):
        name = (urlsplit("//" + headers.get("host", "")).hostname or "").rstrip(".")
        if "." not in name or name.endswith(".localhost") or is_address(name):
            return
    raise PermissionDenied(
        "without keys this server answers at localhost or at an IP address only: set SERVE_API_KEYS, "
        "or SERVE_ALLOW_ANONYMOUS=true to answer everyone under any name"
    )


def _refuse_foreign_page(headers: Headers) -> None:
    """Without keys, any page that its user has open could talk to a server on the user's machine.

    Raises:
        PermissionDenied: the connection comes from a page of another origin.
    """
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise PermissionDenied("a page of another origin may only connect with an API key: set SERVE_API_KEYS")


class BodyLimit:
    """Refuses bodies beyond ``max_bytes``, declared or not, without keeping them, and those that take for ever."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request whose body is counted as it is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        deadline = time.monotonic() + BODY_TIMEOUT_S
        in_time = partial(_in_time, receive, deadline)
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await self._refuse(int(declared), in_time, scope, receive, send)
            return
        num_bytes, is_complete = 0, False

        async def counted() -> Message:
            nonlocal num_bytes, is_complete
            message = await (receive() if is_complete else in_time())
            if message["type"] == "http.request":
                is_complete = not message.get("more_body", False)
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    await _discard(message, num_bytes, in_time)
                    raise self._error()
            return message

        await self._app(scope, counted, send)

    async def _refuse(self, declared: int, in_time: Receive, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(self._error(), scope)
        if declared <= MAX_DISCARDED_BYTES:
            await _discard({"more_body": True}, 0, in_time)
        else:
            response.headers["connection"] = "close"
        await response(scope, receive, send)

    def _error(self) -> RequestTooLarge:
        return RequestTooLarge(f"the body exceeds {self._max_bytes} bytes; send less text")


async def _in_time(receive: Receive, deadline: float) -> Message:
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await receive()
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {BODY_TIMEOUT_S:g} s; send it faster") from None


async def _discard(message: Message, num_bytes: int, in_time: Receive) -> None:
    with suppress(RequestTimeout):
        while message.get("more_body") and num_bytes <= MAX_DISCARDED_BYTES:
            message = await in_time()
            num_bytes += len(message.get("body", b""))
