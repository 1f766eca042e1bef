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
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from serve.api.app import create_app
from serve.errors import EngineDead, ServeError
from serve.http import BoundedHttp
from serve.lifecycle import Lifecycle
from serve.settings import Settings

logger = logging.getLogger(__name__)

IDLE_CONNECTION_S = 75
"""Longer than load balancers keep theirs (60 s is common): they then close first, and no request meets a closed one."""

LAST_WRITES_S = 2
"""Seconds that connections get to take their last bytes after the drain."""


class DrainingServer(uvicorn.Server):
    """Ends on SIGTERM or SIGINT after a drain, at once on the second signal, and when the engine dies."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_timeout_s = drain_timeout_s
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: ServeError | None = None
        lifecycle.on_failure(self._on_failure)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not gc.isenabled():  # as __main__ began; what is there now stays, and is not looked through again
            gc.freeze()
            gc.enable()
        for server in getattr(self, "servers", []):
            for bound in server.sockets:
                host, port = bound.getsockname()[:2]
                logger.info("Listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

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
        await self._lifecycle.drain(self._drain_timeout_s)
        self.should_exit = True

    def _on_failure(self, error: ServeError) -> None:
        self.failure = error
        self.should_exit = True


class BackgroundServer:
    """The server in a thread, for platforms whose own runtime has the main thread and the signals.

    Args:
        app: From ``create_app``.
        settings: The same as the app's.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._server = _server(app, settings)
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
    """Serve until a signal; return the exit status: 0, 3 (the model cannot be loaded) or 70 (the engine died)."""
    server = _server(create_app(settings), settings)
    try:
        server.run()
    except SystemExit:  # uvicorn has logged why
        logger.error("Cannot listen on %s:%d; set SERVE_PORT to a free port", settings.host, settings.port)
        return 1
    if server.failure is not None:
        return getattr(server.failure, "exit_status", EngineDead.exit_status)
    return 0 if server.started else 1


def _server(app: FastAPI, settings: Settings) -> DrainingServer:
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
    return DrainingServer(config, app.state.lifecycle, settings.drain_timeout_s)
