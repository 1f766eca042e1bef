"""uvicorn, taught to drain: the port stays open and says 503 while running requests finish."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from serve.arrival import ArrivingApp
from serve.errors import EngineDead, ServeError
from serve.http import BoundedHttp
from serve.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serve.lifecycle import Lifecycle

logger = logging.getLogger(__name__)

IDLE_CONNECTION_S = 75
"""Longer than load balancers keep theirs (60 s is common): they then close first, and no request meets a closed one."""

LAST_WRITES_S = 2
"""Seconds that connections get to take their last bytes after the drain."""


class DrainingServer(uvicorn.Server):
    """Ends on SIGTERM or SIGINT after a drain, at once on the second signal, and when the engine dies.

    Before :meth:`adopt` nothing can run, and the first signal ends it.

    Args:
        config: uvicorn's.
        drain_timeout_s: Seconds that running requests get to finish.
        arriving: The app, where it is made once the port is open.
    """

    def __init__(self, config: uvicorn.Config, drain_timeout_s: float, arriving: ArrivingApp | None = None) -> None:
        super().__init__(config)
        self._arriving = arriving
        self._lifecycle: Lifecycle | None = None
        self._drain_timeout_s = drain_timeout_s
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: ServeError | None = None

    def adopt(self, app: FastAPI) -> None:
        """The app is there: its lifecycle says when to end, and what to wait for."""
        self._lifecycle = app.state.lifecycle
        app.state.lifecycle.on_failure(self.give_up)
        if not gc.isenabled():  # as __main__ began; what is there now stays, and is not looked through again
            gc.freeze()
            gc.enable()

    def give_up(self, error: ServeError | None = None) -> None:
        """There is nothing (any more) that could answer: end."""
        self.failure = error
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for server in getattr(self, "servers", []):
            for bound in server.sockets:
                host, port = bound.getsockname()[:2]
                logger.info("Listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if self._arriving is not None:
            self._arriving.begin()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler.  uvicorn's own would re-raise the signal at the end; a drain ends with status 0."""
        del frame
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, name: str) -> None:
        if self._draining is not None:
            logger.warning("%s again: ending at once", name)
            self.should_exit = self.force_exit = True
            return
        logger.info("%s: draining for at most %g s", name, self._drain_timeout_s)
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        if self._lifecycle is not None:
            await self._lifecycle.drain(self._drain_timeout_s)
        elif self._arriving is not None:
            self._arriving.refuse()
        self.should_exit = True


class BackgroundServer:
    """The server in a thread, for platforms whose own runtime has the main thread and the signals.

    Args:
        app: From ``create_app``.
        settings: The same as the app's.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._server = _server(app, settings)
        self._server.adopt(app)
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    def _run(self) -> None:
        with suppress(SystemExit):  # the port cannot be bound; uvicorn has logged why
            self._server.run()

    def start(self) -> None:
        """Return when the port is open.

        Raises:
            OSError: it could not be opened; the log says why.
        """
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise OSError(f"cannot listen on {self._server.config.host}:{self._server.config.port}")
            time.sleep(0.01)

    def drain(self) -> None:
        """Return when running requests are done, after ``SERVE_DRAIN_TIMEOUT_S`` and the last writes at most."""
        if self._thread.is_alive():
            self._server.handle_exit(signal.SIGTERM, None)
            self._thread.join()


def run(settings: Settings) -> int:
    """Serve until a signal; return the exit status: 0, 3 (the model cannot be loaded) or 70 (the engine died).

    Raises:
        ConfigError: the settings ask for what their engine cannot do.
    """
    app = ArrivingApp(partial(_make_app, settings), lambda made: server.adopt(made), lambda: server.give_up())
    server = _server(app, settings)
    try:
        server.run()
    except SystemExit:  # uvicorn has logged why
        logger.error("Cannot listen on %s:%d; set SERVE_PORT to a free port", settings.host, settings.port)
        return 1
    if app.failure is not None:
        raise app.failure
    if server.failure is not None:
        return getattr(server.failure, "exit_status", EngineDead.exit_status)
    return 0 if server.started else 1


def _make_app(settings: Settings) -> FastAPI:
    from serve.api.app import create_app  # noqa: PLC0415 - takes longer than all else before the port is open

    return create_app(settings)


def _server(app: ArrivingApp | FastAPI, settings: Settings) -> DrainingServer:
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedHttp,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=LAST_WRITES_S,
        lifespan="on",
        ws_max_size=settings.max_body_bytes,
        **options,
    )
    return DrainingServer(config, settings.drain_timeout_s, app if isinstance(app, ArrivingApp) else None)
