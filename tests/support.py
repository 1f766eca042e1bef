"""What several test layers share."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import pytest
import uvicorn
from fastapi import FastAPI

from serve.api.app import create_app
from serve.engine.base import Engine
from serve.lifecycle import Lifecycle, State
from serve.settings import Settings

T = TypeVar("T")


def missing(reason: str) -> NoReturn:
    """Skip a test that this machine cannot run, or fail it under CI, where everything has to be there.

    ``reason`` says what is missing and how to get it.
    """
    if os.environ.get("CI"):
        pytest.fail(f"CI must be able to run this: {reason}", pytrace=False)
    pytest.skip(reason)


@dataclass(frozen=True, slots=True)
class Served:
    """A running server: its base address and its app."""

    url: str
    app: FastAPI

    @property
    def lifecycle(self) -> Lifecycle:
        return self.app.state.lifecycle

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def on_loop(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the server's event loop, where its state may be read."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.app.state.loop).result(5)


@contextmanager
def serving(engine: Engine | None = None, *, wait: bool = True, **settings: Any) -> Iterator[Served]:
    """A real uvicorn on a free port in a thread, with the real app.

    ``settings`` default to the echo engine on loopback.  ``wait`` waits for ready.
    """
    app = create_app(Settings(**{"engine": "echo", "log_format": "text", **settings, "_env_file": None}), engine)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    )
    startup = server.startup

    async def remember_loop(sockets: list[socket.socket] | None = None) -> None:
        app.state.loop = asyncio.get_running_loop()
        await startup(sockets)

    server.startup = remember_loop
    thread = threading.Thread(target=server.run, name="test-server", daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        served = Served(f"http://127.0.0.1:{port}", app)
        if wait:
            eventually(lambda: served.lifecycle.state is not State.LOADING, timeout_s=60)
        yield served
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until ``condition`` holds; fail when it does not in ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"still not true after {timeout_s} s: {condition}")
        time.sleep(0.01)


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """A chat-completion request to the echo model."""
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def sse_data(body: str) -> list[str]:
    """The data of each event of a finished stream."""
    return [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]


def sse_chunks(body: str) -> list[dict[str, Any]]:
    """The JSON events of a finished stream, which must end in ``[DONE]``."""
    data = sse_data(body)
    assert data[-1] == "[DONE]", data[-3:]
    return [json.loads(line) for line in data[:-1]]


def joined(chunks: list[dict[str, Any]]) -> str:
    """The text that a stream's chunks add up to."""
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
