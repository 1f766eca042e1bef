from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from support import openai_error

from serve.api.schemas.common import Health
from serve.arrival import EARLY_HEALTH, PHASE, ArrivingApp
from serve.errors import ConfigError


class Lifespan:
    """uvicorn's half of the lifespan protocol."""

    def __init__(self, app: ArrivingApp) -> None:
        self._todo: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.said: list[str] = []
        self._has_said = asyncio.Event()
        self._task = asyncio.create_task(app({"type": "lifespan"}, self._todo.get, self._send))  # pyright: ignore[reportArgumentType]

    async def _send(self, message: Any) -> None:
        self.said.append(message["type"])
        self._has_said.set()

    async def startup(self) -> None:
        await self._todo.put({"type": "lifespan.startup"})
        await asyncio.wait_for(self._has_said.wait(), 5)

    async def shutdown(self) -> None:
        await self._todo.put({"type": "lifespan.shutdown"})
        await asyncio.wait_for(self._task, 5)


async def ask(app: ArrivingApp, path: str, method: str = "GET") -> list[dict[str, Any]]:
    """What the app sends for one request."""
    sent: list[dict[str, Any]] = []
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "headers": [], "root_path": "", "scheme": "http"}

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 5)
    return sent


def test_early_health_has_the_fields_of_the_later_one():
    assert json.loads(EARLY_HEALTH) == Health(status="loading", phase=PHASE).model_dump()


def test_health_answers_before_the_app_is_made_and_others_wait_for_it():
    may_arrive, seen = threading.Event(), list[str]()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        seen.append("started")
        yield
        seen.append("stopped")

    def make() -> FastAPI:
        assert may_arrive.wait(5)
        made = FastAPI(lifespan=lifespan, openapi_url=None)
        made.add_api_route("/late", lambda: "here")
        return made

    async def scenario() -> None:
        app = ArrivingApp(make, lambda made: seen.append(type(made).__name__), lambda: seen.append("failed"))
        server = Lifespan(app)
        await server.startup()
        assert [message["type"] for message in await ask(app, "/health")] == [
            "http.response.start",
            "http.response.body",
        ]
        app.begin()
        early = (await ask(app, "/health"))[1]["body"]
        waiting = asyncio.create_task(ask(app, "/late"))
        await asyncio.sleep(0.01)
        assert (json.loads(early)["phase"], waiting.done(), seen) == (PHASE, False, [])
        may_arrive.set()
        assert (await waiting)[1]["body"] == b'"here"'
        assert (await ask(app, "/health"))[0]["status"] == 404  # the app's own business now
        await server.shutdown()
        assert server.said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    asyncio.run(scenario())
    assert seen == ["FastAPI", "started", "stopped"]


@pytest.mark.parametrize("stage", ["make", "start"])
def test_an_app_that_cannot_be_made_ends_those_who_wait_and_the_server(stage: str):
    error, told = ConfigError("wrong"), list[str]()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        raise error
        yield

    def make() -> FastAPI:
        if stage == "make":
            raise error
        return FastAPI(lifespan=lifespan)

    async def scenario() -> None:
        app = ArrivingApp(make, lambda _: None, lambda: told.append("failed"))
        server = Lifespan(app)
        await server.startup()
        app.begin()
        assert (await ask(app, "/v1/models"))[0]["status"] == 503
        assert app.failure is error
        await server.shutdown()
        assert server.said[-1] == "lifespan.shutdown.complete"

    asyncio.run(scenario())
    assert told == ["failed"]


@pytest.mark.parametrize(("path", "check"), [("/v1/models", openai_error), ("/v1/messages", None)])
def test_a_server_that_ends_before_the_app_is_there_sends_who_waits_elsewhere(path: str, check: Any):
    async def scenario() -> None:
        app = ArrivingApp(lambda: pytest.fail("nobody needs it"), lambda _: None, lambda: None)
        waiting = asyncio.create_task(ask(app, path))
        await asyncio.sleep(0)
        app.refuse()
        start, body = await waiting
        assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"10")
        error = json.loads(body["body"])
        assert (check(error)["code"] == "shutting_down") if check else (error["error"]["type"] == "overloaded_error")
        assert (await ask(app, path))[0]["status"] == 503
        assert json.loads((await ask(app, "/health"))[1]["body"])["status"] == "loading"

    asyncio.run(scenario())


@pytest.mark.parametrize("stage", ["the port is not open", "the app is being made"])
def test_a_server_that_ends_before_the_app_is_there_does_not_wait_for_it(stage: str):
    may_arrive = threading.Event()

    def make() -> FastAPI:
        may_arrive.wait(5)
        return FastAPI()

    async def scenario() -> None:
        app = ArrivingApp(make, lambda _: pytest.fail("too late"), lambda: pytest.fail("nothing failed"))
        server = Lifespan(app)
        await server.startup()
        if stage == "the app is being made":
            app.begin()
            await asyncio.sleep(0.01)
        await server.shutdown()
        assert server.said[-1] == "lifespan.shutdown.complete"
        may_arrive.set()

    asyncio.run(scenario())
