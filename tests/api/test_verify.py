"""``trimaran verify`` against a healthy server, and against servers with one fault each: it is caught and named."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fronts import App, Message, Receive, Send, in_front
from support import Served, eventually, serving

from serve.engine.base import EngineConfig
from serve.engine.echo import EchoEngine
from trimaran.cli import main
from trimaran.verify.realtime import check_realtime
from trimaran.verify.target import Stream, Target, runpod_queue

KEY = "sk-verify"
SLOW = 0.006


@contextmanager
def slow_server(**settings: Any) -> Iterator[Served]:
    """6 ms a token: long enough for its pace to be judged."""
    slots = settings.get("max_batch_size", 8)
    engine = EchoEngine(EngineConfig(max_batch_size=slots), step_s=SLOW)
    with serving(engine, **{"api_keys": (KEY,), **settings}) as served:
        yield served


@pytest.fixture(scope="module")
def healthy() -> Iterator[Served]:
    with slow_server() as served:
        yield served


def verify(url: str, *options: str, key: str = KEY) -> Result:
    return CliRunner().invoke(main, ["verify", url, "--key", key, "--wait", "5", *options])


def failures(result: Result) -> dict[str, str]:
    """Name and message of each check that failed."""
    body = json.loads(result.stdout)
    assert body["passed"] is not any(check["status"] == "failed" for check in body["checks"])
    return {check["name"]: check["message"] for check in body["checks"] if check["status"] == "failed"}


def test_healthy_server_passes_and_its_report_says_so(healthy):
    result = verify(healthy.url, "--json")
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body["passed"]
    assert body["model"] == "echo"
    found = {check["name"]: check["status"] for check in body["checks"]}
    assert found.pop("golden tokens") == "skipped"
    assert set(found.values()) == {"passed"}, result.output
    assert len(found) == 8
    assert "process_start" in body["cold_start_s"]


def test_report_for_people_has_the_waterfall_and_no_key(healthy):
    result = verify(healthy.url)
    assert result.exit_code == 0, result.output
    assert "Verified: 8 passed, 0 failed, 1 skipped" in result.output
    assert "Cold start" in result.output
    assert KEY not in result.output


class Buffering:
    """Sends the whole answer at its end, or in blocks of ``size`` bytes."""

    def __init__(self, app: App, size: int | None = None) -> None:
        self.app, self.size = app, size

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        held = bytearray()

        async def hold(message: Message) -> None:
            if message["type"] != "http.response.body":
                await send(message)
                return
            held.extend(message.get("body", b""))
            more = message.get("more_body", False)
            if not more or (self.size and len(held) >= self.size):
                body = bytes(held)
                held.clear()
                await send({"type": "http.response.body", "body": body, "more_body": more})

        await self.app(scope, receive, hold)


class Rewriting:
    """Replaces bytes in each message of an answer."""

    def __init__(self, app: App, found: bytes, replacement: bytes) -> None:
        self.app, self.found, self.replacement = app, found, replacement

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def cut(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": message.get("body", b"").replace(self.found, self.replacement)}
            await send(message)

        await self.app(scope, receive, cut)


class HoldsOn:
    """Never tells the server that a client has left."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def patient() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                await asyncio.Event().wait()
            return message

        await self.app(scope, patient, send)


class Sockets:
    """Refuses a WebSocket as a proxy that knows none would, or closes it after some messages."""

    def __init__(self, app: App, num_messages: int | None) -> None:
        self.app, self.left = app, num_messages

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and self.left is None:
            await receive()
            await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b""})
            return

        async def cut(message: Message) -> None:
            if message["type"] == "websocket.send" and self.left is not None:
                self.left -= 1
                if self.left < 0:
                    message = {"type": "websocket.close", "code": 1001}
            await send(message)

        await self.app(scope, receive, cut)


@pytest.mark.parametrize(
    ("num_messages", "said"), [(None, "a proxy in front does not pass WebSockets"), (3, "broke off: ConnectionClosed")]
)
def test_fault_of_a_proxy_with_websockets_is_named(healthy, num_messages, said):
    with in_front(healthy, lambda app: Sockets(app, num_messages)) as url, Target(url, KEY, 5) as target:
        target.model = "echo"
        outcome = check_realtime(target, Stream())
    assert outcome.status == "failed"
    assert said in outcome.message


class Limits:
    """Refuses the first requests with 429."""

    def __init__(self, app: App, retry_after: bytes) -> None:
        self.app, self.retry_after, self.left = app, retry_after, 2

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if self.left:
            self.left -= 1
            await send({"type": "http.response.start", "status": 429, "headers": [(b"retry-after", self.retry_after)]})
            await send({"type": "http.response.body"})
        else:
            await self.app(scope, receive, send)


def test_limits_of_requests_are_waited_for_where_they_ask_for_a_moment(healthy):
    with in_front(healthy, lambda app: Limits(app, b"0")) as url, Target(url, KEY, 5) as target:
        assert target.ask("GET", "/v1/models").status_code == 200
    with in_front(healthy, lambda app: Limits(app, b"0")) as url, Target(url, KEY, 5) as target:
        target.model = "echo"
        assert target.stream(target.chat("hello", 9)).is_done
    with in_front(healthy, lambda app: Limits(app, b"86400")) as url, Target(url, KEY, 5) as target:
        assert target.ask("GET", "/v1/models").status_code == 429


def test_server_without_a_websocket_is_no_fault():
    with serving(engine="remote", remote_url="http://127.0.0.1:9") as gateway, Target(gateway.url, "", 5) as target:
        assert check_realtime(target, Stream()).status == "skipped"


def test_websocket_that_answers_otherwise_than_the_stream_is_named(healthy):
    with Target(healthy.url, KEY, 5) as target:
        target.model = "echo"
        outcome = check_realtime(target, Stream(pieces=["Another answer altogether."]))
    assert "the same greedy request begins 'Write a long story" in outcome.message


@pytest.mark.parametrize(
    ("url", "queue"),
    [
        ("https://api.runpod.ai/v2/abc", "https://api.runpod.ai/v2/abc/openai"),
        ("https://api.runpod.ai/v2/abc/runsync", "https://api.runpod.ai/v2/abc/openai"),
        ("https://api.runpod.ai/v2/abc/openai/v1/", "https://api.runpod.ai/v2/abc/openai"),
        ("http://127.0.0.1:8010/v2/local/run", "http://127.0.0.1:8010/v2/local/openai"),
        ("https://abc.api.runpod.ai/v1", None),
        ("https://my.server/v2/abc", None),
    ],
)
def test_native_address_of_runpods_queue_is_asked_through_openais_routes(url, queue):
    assert runpod_queue(url) == queue
    with Target(url, "k", 1) as target:
        assert target.url == (queue or url.removesuffix("/v1"))
        assert target.edge == ("RunPod" if "runpod.ai" in url or queue else "")


@pytest.mark.parametrize(
    ("fault", "name", "said"),
    [
        (Buffering, "pace", "buffered: the first token came"),
        (lambda app: Buffering(app, 4096), "pace", "buffered in blocks"),
        (lambda app: Rewriting(app, b"data: [DONE]\n\n", b""), "stream", "without [DONE]"),
        (lambda app: Rewriting(app, b'"total_tokens":1', b'"total_tokens":3'), "usage", "do not add up"),
        (lambda app: Rewriting(app, b'"usage":', b'"usage" :  '), "usage", "no whole answer"),
        (HoldsOn, "disconnect", "its request still runs"),
    ],
    ids=["buffers", "buffers-blocks", "drops-done", "miscounts", "breaks-off", "never-frees"],
)
def test_fault_of_a_proxy_is_caught_and_named(healthy, fault, name, said):
    with in_front(healthy, fault) as url:
        result = verify(url, "--json")
    assert result.exit_code == 1, result.output
    assert said in failures(result)[name]
    eventually(healthy.is_idle, timeout_s=30)


def test_swapped_model_is_caught(healthy, tmp_path):
    kept = tmp_path / "reference.json"
    assert verify(healthy.url, "--record", str(kept)).exit_code == 0
    assert json.loads(kept.read_text())["model"] == "echo"
    assert "golden tokens" not in failures(verify(healthy.url, "--reference", str(kept), "--json"))
    other = tmp_path / "other.jinja"
    other.write_text("Another: {{ messages[-1].content }}")
    with slow_server(chat_template=other) as swapped:
        result = verify(swapped.url, "--reference", str(kept), "--json")
    assert result.exit_code == 1
    assert "another model, template or precision" in failures(result)["golden tokens"]


def test_server_that_ignores_keys_is_caught():
    with slow_server(api_keys=(), allow_anonymous=True) as open_to_all:
        found = failures(verify(open_to_all.url, "--json"))
    assert "answered without the right key: GET /v1/models with no key: 200" in found["keys"]


def test_concurrency_below_the_promise_is_caught():
    with slow_server(max_batch_size=1) as narrow:
        found = failures(verify(narrow.url, "--json", "--concurrency", "3"))
    assert "fewer run at once than promised" in found["concurrency of 3"]


def test_nobody_there_and_wrong_arguments_have_exit_codes_of_their_own(healthy, tmp_path):
    assert verify("http://127.0.0.1:9", "--wait", "0").exit_code == 3
    for address in ("http://127.0.0.1:9", "http://localhost:9/v1", "http://[::1]:9"):
        nobody = CliRunner().invoke(main, ["verify", address])
        assert nobody.exit_code == 3
        assert "nothing listens on port 9 of this machine" in nobody.stderr
    assert verify(healthy.url, key="sk-wrong").exit_code == 2
    assert verify(healthy.url, "--header", "nonsense").exit_code == 2
    for wrong in ("notaurl", "ftp://my.server", "http://", "http://my.server:x", "http://[::1"):
        refused = CliRunner().invoke(main, ["verify", wrong])
        assert (refused.exit_code, "no server's address" in refused.output) == (2, True)
    missing = verify(healthy.url, "--reference", str(tmp_path / "none.json"))
    assert missing.exit_code == 2
    assert "--record" in missing.output
