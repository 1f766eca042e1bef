"""What several test layers share."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest
import uvicorn
from fastapi import FastAPI

from serve.api.app import create_app
from serve.engine.base import Engine, EngineConfig, ModelFiles, Phase, StepOutput
from serve.engine.echo import EOS_TOKEN_ID, EchoRunner
from serve.engine.scheduler import Batch
from serve.engine.worker import StepEngine
from serve.lifecycle import Lifecycle, State
from serve.settings import Settings
from serve.types import EngineStats

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

    def stats(self) -> EngineStats:
        """The engine's load."""
        return self.on_loop(self.lifecycle.engine.stats)

    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        stats = self.stats()
        return stats.num_running == 0 and stats.num_waiting == 0


class _PromptServer(uvicorn.Server):
    """Sees within a moment that it should end; uvicorn looks ten times a second, and these tests start hundreds."""

    async def main_loop(self) -> None:
        counter = 0
        while not await self.on_tick(counter):
            await asyncio.sleep(0.01)
            counter = (counter + 1) % 864_000


@contextmanager
def serving(engine: Engine | None = None, /, *, wait: bool = True, **settings: Any) -> Iterator[Served]:
    """A real uvicorn on a free port in a thread, with the real app.

    ``settings`` default to the echo engine on loopback.  ``wait`` waits for ready.
    """
    app = create_app(Settings(**{"engine": "echo", "log_format": "text", **settings, "_env_file": None}), engine)
    server = _PromptServer(
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
    # Not splitlines(): U+2028 and its like are ordinary characters within a line.
    return [line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: ")]


def sse_chunks(body: str) -> list[dict[str, Any]]:
    """The JSON events of a finished stream, which must end in ``[DONE]``."""
    data = sse_data(body)
    assert data[-1] == "[DONE]", data[-3:]
    return [json.loads(line) for line in data[:-1]]


def joined(chunks: list[dict[str, Any]]) -> str:
    """The text that a stream's chunks add up to."""
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def openai_error(body: Any) -> dict[str, Any]:
    """The error of a failed answer, which must have OpenAI's shape exactly."""
    assert set(body) == {"error"}, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert error["message"], error
    assert isinstance(error["message"], str), error
    assert isinstance(error["type"], str), error
    assert isinstance(error["param"], str | None), error
    assert isinstance(error["code"], str | None), error
    return error


class ScriptedRunner(EchoRunner):
    """Answers each prompt with the bytes of ``script``; None there is a row of NaN, an exception fails that step."""

    def __init__(self, script: Sequence[int | BaseException | None], config: EngineConfig) -> None:
        super().__init__(config)
        self._script = script

    def step(self, batch: Batch) -> StepOutput:
        places = [len(sequence.output_token_ids) for sequence in batch.sampled]
        steps = [self._script[at] if at < len(self._script) else EOS_TOKEN_ID for at in places]
        for step in steps:
            if isinstance(step, BaseException):
                raise step
        return StepOutput([step for step in steps if not isinstance(step, BaseException)])


def scripted_engine(script: Sequence[int | BaseException | None]) -> StepEngine:
    """:class:`ScriptedRunner` behind the real step loop."""
    config = EngineConfig()
    return StepEngine(config, ScriptedRunner(script, config))


class GatedRunner(EchoRunner):
    """An echo whose load blocks a thread until ``gate`` is set, and then raises ``failure`` if there is one."""

    def __init__(self, config: EngineConfig, failure: Exception | None = None) -> None:
        super().__init__(config)
        self.gate = threading.Event()
        self._failure = failure

    def load(self, files: ModelFiles, phase: Phase) -> None:
        with phase("weights"):
            self.gate.wait(60)
        if self._failure:
            raise self._failure


@contextmanager
def loading(failure: Exception | None = None, **settings: Any) -> Iterator[tuple[Served, threading.Event]]:
    """A server whose model loads until the event is set."""
    config = EngineConfig()
    runner = GatedRunner(config, failure)
    try:
        with serving(StepEngine(config, runner), wait=False, **settings) as served:
            yield served, runner.gate
    finally:
        runner.gate.set()


@dataclass(frozen=True, slots=True)
class Running:
    """A server process."""

    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """What it has written to stderr so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def url(self) -> str:
        """Its base address, once it listens."""
        eventually(lambda: "Listening on " in self.log or self.process.poll() is not None, timeout_s=30)
        found = re.search(r"Listening on (http://127\.0\.0\.1:\d+)", self.log)
        assert found, self.log
        return found[1]


@contextmanager
def running(*arguments: str, before: str = "", **environment: str) -> Iterator[Running]:
    """``python -m serve`` on a free port, with the echo engine unless ``environment`` says otherwise.

    ``before`` is Python that runs first in the process, to make it slow or to break it.
    """
    defaults = {"SERVE_ENGINE": "echo", "SERVE_PORT": "0", "PYTHONPATH": str(Path(__file__).parent.parent)}
    start = (
        ["-c", f"import runpy\n{before}\nrunpy.run_module('serve', run_name='__main__')"] if before else ["-m", "serve"]
    )
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder, "stderr")
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *start, *arguments],
                cwd=folder,  # no .env of the developer
                env={name: value for name, value in {**os.environ, **defaults, **environment}.items() if value},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        try:
            yield Running(process, log_file)
        finally:
            process.kill()
            process.wait(10)


def named_events(body: str) -> list[dict[str, Any]]:
    """The JSON events of a finished stream whose events have names, which are their types."""
    events: list[dict[str, Any]] = []
    for block in body.rstrip("\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}", block
        events.append(event)
    return events


def message_error(response: Any) -> dict[str, Any]:
    """The error of a failed answer, which must have Anthropic's shape exactly."""
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}, body
    assert body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"]
    assert set(body["error"]) == {"type", "message"}, body
    assert body["error"]["message"]
    return body["error"]


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    """A response format."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}
