"""An ASGI app on a loopback port, inside a command that keeps its own signals."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn

from serve.errors import ConfigError


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """uvicorn would end the process on a signal, before the command has ended what it started."""
        yield


@asynccontextmanager
async def serving(app: Any, port: int) -> AsyncGenerator[str]:
    """Listen on loopback at ``port`` (0: any free one); gives the address.

    Raises:
        ConfigError: the port is taken.
    """
    # With the protocol named: asyncio sets TCP_NODELAY on no other connection, and small answers would wait 40 ms.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen on 127.0.0.1:{port}: {os.strerror(error.errno or 0)}; choose another --port"
        ) from None
    server = _Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
    task = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        bound.close()
