"""Drives an ASGI app in process: no port, no second HTTP hop.

The app runs on an event loop of its own, in a thread of its own, so that neither the SDK's loops nor its blocking calls
hold up a token.  An :class:`Exchange` is one request: opened and read on the caller's loop, served on the app's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, unquote

T = TypeVar("T")
Message = MutableMapping[str, Any]

logger = logging.getLogger("serve.runpod")

ASGI_VERSION = {"version": "3.0", "spec_version": "2.3"}
"""As uvicorn says.  From 2.4 on Starlette expects ``send`` to raise instead of listening for the disconnect, and then
leaves the app's generator suspended: the engine would go on for a client that left."""

CLOSE_S = 5.0
"""Seconds that the app gets to end a request after its disconnect, before its task is cancelled."""


@dataclass(frozen=True, slots=True)
class AppRequest:
    """One request to the app.

    ``target`` is a path with an optional query; ``caller`` is whom the platform authenticated (or empty);
    ``request_id`` becomes ``X-Request-ID``.
    """

    method: str
    target: str
    body: bytes = b""
    caller: str = ""
    request_id: str = ""


def scope_of(request: AppRequest, caller_key: str) -> dict[str, Any]:
    """The ASGI scope of a request; ``caller_key`` is where the app looks for an authenticated caller."""
    path, _, query = request.target.partition("?")
    headers = [(b"host", b"runpod"), (b"content-length", str(len(request.body)).encode())]
    if request.body:
        headers.append((b"content-type", b"application/json"))
    if request.request_id:
        headers.append((b"x-request-id", request.request_id.encode("ascii", errors="replace")))
    return {
        "type": "http",
        "asgi": ASGI_VERSION,
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": quote(path, safe="/%").encode(),
        "query_string": quote(query, safe="=&%+").encode(),
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": ("runpod", 80),
        "state": {},
        **({caller_key: request.caller} if request.caller else {}),
    }


class Exchange:
    """One request in the app.

    Made by :meth:`AppThread.open` on the reader's loop.  :meth:`start`, then :meth:`read` until None; :meth:`close` at
    any time, from any thread, any number of times.  ``ended`` is called on the reader's loop when the app has done its
    part, though much of it may not have been read.
    """

    def __init__(
        self,
        app: Any,
        loop: asyncio.AbstractEventLoop,
        scope: dict[str, Any],
        body: bytes,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self._app = app
        self._app_loop = loop
        self._reader_loop = asyncio.get_running_loop()
        self._scope = scope
        self._body: bytes | None = body
        self._ended = ended
        self._messages: deque[Message | None] = deque()  # append and popleft are atomic
        self._arrived = asyncio.Event()
        self._gone = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._is_closed = False
        self._app_loop.call_soon_threadsafe(self._begin)

    # On the app's loop.

    def _begin(self) -> None:
        self._task = self._app_loop.create_task(self._serve())

    async def _serve(self) -> None:
        try:
            if not self._gone.is_set():
                await self._app(self._scope, self._receive, self._send)
        except Exception as error:  # the app has logged it, and answered if it still could
            self._failure = error
        finally:
            self._put(None)
            if self._ended is not None:
                with suppress(RuntimeError):  # the reader's loop ended before
                    self._reader_loop.call_soon_threadsafe(self._ended)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        # Neither waits nor raises, so that a cancellation always lands inside the app's own generator and closes it.
        if not self._gone.is_set():
            self._put(message)

    def _put(self, message: Message | None) -> None:
        self._messages.append(message)
        with suppress(RuntimeError):  # the reader's loop ended before
            self._reader_loop.call_soon_threadsafe(self._arrived.set)

    def _disconnect(self) -> None:
        self._gone.set()
        if self._task is not None and not self._task.done():
            self._app_loop.call_later(CLOSE_S, self._task.cancel)

    # On the reader's loop.

    async def start(self) -> tuple[int, dict[str, str]]:
        """Wait for the response's status and headers (lower-case names).

        Raises:
            RuntimeError: the app ended without a response.
        """
        message = await self._next()
        if message is None:
            raise RuntimeError("the app ended without a response") from self._failure
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
        return message["status"], headers

    async def read(self) -> bytes | None:
        """Everything that the app has sent since the last call, at least one byte; None after the end.

        Raises:
            RuntimeError: the app broke off in the middle of the response.
        """
        data = b""
        while not data:
            message = await self._next()
            if message is None:
                return self._end()
            data = message.get("body", b"")
        while self._messages and (message := self._messages[0]) is not None:
            self._messages.popleft()
            data += message.get("body", b"")
        return data

    def _end(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the app broke off in the middle of a response") from self._failure

    async def _next(self) -> Message | None:
        while not self._messages:
            self._arrived.clear()
            if not self._messages:
                await self._arrived.wait()
        return self._messages.popleft() if self._messages[0] is not None else None

    def close(self) -> None:
        """Tell the app that nobody reads any more."""
        if not self._is_closed:
            self._is_closed = True
            with suppress(RuntimeError):  # the app's loop ended before
                self._app_loop.call_soon_threadsafe(self._disconnect)


class AppThread:
    """An app with its lifespan, on an event loop in a thread.

    Args:
        app: A FastAPI or Starlette app.
        caller_key: The scope key under which the app looks for a caller whom the platform authenticated.
    """

    def __init__(self, app: Any, caller_key: str) -> None:
        self._app = app
        self._caller_key = caller_key
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="app", daemon=True)

    def start(self) -> None:
        """Start the app; returns when its lifespan has begun (the model may still be loading)."""
        self._thread.start()
        self._is_up.wait()

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        finally:
            self._is_up.set()

    async def _live(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self._app.router.lifespan_context(self._app):
            self._is_up.set()
            await self._stop.wait()

    @property
    def is_alive(self) -> bool:
        """Whether the app has not ended."""
        return self._thread.is_alive()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The app's event loop."""
        if self._loop is None:
            raise RuntimeError("the app was not started")
        return self._loop

    def open(self, request: AppRequest, ended: Callable[[], None] | None = None) -> Exchange:
        """Begin one request; call it on the loop that reads the answer."""
        return Exchange(self._app, self.loop, scope_of(request, self._caller_key), request.body, ended)

    def call(self, function: Callable[[], T], timeout_s: float = 10.0) -> T:
        """Call ``function`` on the app's loop, from another thread."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """End the lifespan and the thread; gives up after ``timeout_s`` seconds."""
        if self._loop is not None and self._stop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("The app did not end within %g s", timeout_s)
