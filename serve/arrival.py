"""An app that is still on its way: the port is open and ``/health`` answers while Python imports the rest.

Importing FastAPI, the schemas and the routes takes longer than everything before it.  Until they are there, liveness is
all that can be told, and it is what a platform asks first; any other request waits a fraction of a second for the app.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serve.background import in_background

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Receive, Scope, Send

PHASE = "import_app"
SHUTTING_DOWN = "the server is shutting down; try another replica"
RETRY_AFTER_S = b"10"
EARLY_HEALTH = json.dumps({"status": "loading", "phase": PHASE, "message": None}, separators=(",", ":")).encode()
"""As :class:`serve.api.schemas.common.Health`, which is not imported yet."""


class ArrivingApp:
    """ASGI: an app that is made after the server has started, in a thread.

    Args:
        make: Imports and composes the app.
        on_arrival: Called with it on the event loop, before its own start.
        on_failure: Called when ``make`` or the app's start raised :attr:`failure`; requests that wait get 503 then.
    """

    def __init__(
        self,
        make: Callable[[], FastAPI],
        on_arrival: Callable[[FastAPI], object],
        on_failure: Callable[[], object],
    ) -> None:
        self._make, self._on_arrival, self._on_failure = make, on_arrival, on_failure
        self._app: FastAPI | None = None
        self.failure: Exception | None = None
        self._is_listening, self._is_decided = asyncio.Event(), asyncio.Event()

    def begin(self) -> None:
        """The port is open: nothing that matters more than the imports is left to do."""
        self._is_listening.set()

    def refuse(self) -> None:
        """The server ends before the app is there: who waits is sent elsewhere at once."""
        self._is_decided.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on to the app, or answer for it while it is not there."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if self._app is None:
            if scope["type"] == "http" and scope["path"] == "/health" and scope["method"] in {"GET", "HEAD"}:
                await _say_loading(send)
                return
            await self._is_decided.wait()
        if self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1012, "reason": SHUTTING_DOWN})
        else:
            await _say_ending(scope["path"], send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        ending = asyncio.ensure_future(receive())
        try:
            await self._arrive(ending)
        except Exception as error:
            if self._app is not None:  # it ends badly; uvicorn logs that
                raise
            self.failure = error
            self._on_failure()
            self._is_decided.set()
        await ending
        await send({"type": "lifespan.shutdown.complete"})

    async def _arrive(self, ending: asyncio.Future[Any]) -> None:
        """Make the app and live with it; return early where the server ends before."""
        # Only when the port is open: opening it would have to share the interpreter with the imports.
        if not await _comes_before(asyncio.ensure_future(self._is_listening.wait()), ending):
            return
        making = in_background(self._make)
        if not await _comes_before(making, ending):
            return
        app = making.result()
        self._on_arrival(app)
        async with app.router.lifespan_context(app):
            self._app = app
            self._is_decided.set()
            await ending


async def _comes_before(awaited: asyncio.Future[Any], ending: asyncio.Future[Any]) -> bool:
    await asyncio.wait({awaited, ending}, return_when=asyncio.FIRST_COMPLETED)
    if not awaited.done():
        awaited.cancel()
        return False
    return True


async def _say_loading(send: Send) -> None:
    await _say(200, EARLY_HEALTH, [], send)


async def _say_ending(path: str, send: Send) -> None:
    error = {"message": SHUTTING_DOWN, "type": "service_unavailable_error", "param": None, "code": "shutting_down"}
    body: dict[str, Any] = {"error": error}
    if path.startswith("/v1/messages"):
        error = {"type": "overloaded_error", "message": SHUTTING_DOWN}
        body = {"type": "error", "error": error, "request_id": None}
    await _say(503, json.dumps(body).encode(), [(b"retry-after", RETRY_AFTER_S)], send)


async def _say(status: int, body: bytes, more: list[tuple[bytes, bytes]], send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
