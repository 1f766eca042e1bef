"""The RunPod adapter without its SDK: pieces of streams, the ASGI bridge, which SDK is accepted."""

from __future__ import annotations

import asyncio
import json
import runpy
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from asgi_bridge import AppRequest, AppThread, scope_of
from hypothesis import given
from hypothesis import strategies as st
from job_output import EventSplitter
from runpod_settings import load_runpod_settings
from starlette.requests import Request
from starlette.responses import StreamingResponse

from serve.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "deploy" / "runpod"
EVENT = st.text(st.characters(exclude_characters="\n", exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(st.lists(EVENT, max_size=12), st.data(), st.integers(24, 200))
def test_splitter_gives_the_stream_back_in_pieces_that_fit(events, data, limit):
    text = "".join(f"data: {event}\n\n" for event in events)
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    splitter = EventSplitter(limit)
    pieces = [
        piece
        for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)
        for piece in splitter.feed(raw[start:end])
    ]
    pieces += splitter.end()
    assert "".join(pieces) == text
    for piece in pieces:
        assert piece
        assert len(json.dumps(piece, ensure_ascii=False).encode()) <= limit + 2
        assert piece.endswith("\n\n") or any(len(json.dumps(f"data: {e}\n\n")) > limit // 6 for e in events)


def event(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"


def chunk(finish_reason: str | None = None, **delta: Any) -> str:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


ROLE = chunk(role="assistant", content="")


@pytest.mark.parametrize(
    ("opening", "token"),
    [
        (ROLE, chunk(content="a")),
        (ROLE, chunk(tool_calls=[{"index": 0, "id": "call_1"}])),
        (ROLE, chunk(finish_reason="stop")),
        (ROLE, ": keep-alive\n\n"),
        (ROLE, event({"error": {"message": "no"}})),
        (event({"type": "response.created", "response": {}}), event({"type": "response.output_text.delta"})),
        ("event: message_start\n" + event({"type": "message_start"}), event({"type": "content_block_delta"})),
        ("", event({"choices": [{"index": 0, "text": "a"}]})),
        ("", "data: anything\n\n"),
        ("", event({"type": "response.created", "response": {"instructions": "x" * 20_000}})),
    ],
)
def test_splitter_keeps_the_opening_for_the_first_token(opening, token):
    splitter = EventSplitter()
    assert not list(splitter.feed(opening.encode()))
    assert list(splitter.feed(token.encode())) == [opening + token]
    assert list(splitter.feed(ROLE.encode())) == [ROLE], "nothing waits after that"


def test_splitter_gives_an_opening_that_nothing_follows():
    splitter = EventSplitter()
    assert not list(splitter.feed(ROLE.encode()))
    assert list(splitter.end()) == [ROLE]


def test_splitter_cuts_between_events_and_fills_its_pieces():
    event = "data: " + "é" * 100 + "\n\n"
    pieces = list(EventSplitter(1000).feed((event * 40).encode()))
    assert all(piece.count("\n\n") == len(piece) // len(event) for piece in pieces)
    assert len(pieces) == 10  # four events of 210 bytes each


def test_splitter_holds_half_an_emoji_back():
    splitter, raw = EventSplitter(), "data: 🎉🏽\n\n".encode()
    assert [piece for byte in raw for piece in splitter.feed(bytes([byte]))] == ["data: 🎉🏽\n\n"]


class Waiting:
    """An app whose one route streams until it is closed, and notes that."""

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.router = self

    @asynccontextmanager
    async def lifespan_context(self, app: Any):
        yield

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def numbers():
            try:
                for number in range(10**6):
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(0.001)
            finally:
                self.closed.set()

        await StreamingResponse(numbers(), media_type="text/event-stream")(scope, receive, send)


def bridged(app: Any, use: Callable[[AppThread], Awaitable[Any]]) -> Any:
    thread = AppThread(app, "caller")
    thread.start()
    try:
        return asyncio.run(use(thread))  # pyright: ignore[reportArgumentType]
    finally:
        thread.stop(5)
        assert not thread.is_alive


def test_bridge_gives_everything_that_arrived_in_the_meantime():
    async def use(thread: AppThread) -> tuple[bytes, bytes]:
        exchange = thread.open(AppRequest("GET", "/"))
        assert (await exchange.start())[0] == 200
        first = await exchange.read() or b""
        await asyncio.sleep(0.1)
        second = await exchange.read() or b""
        exchange.close()
        return first, second

    first, second = bridged(Waiting(), use)
    assert first.startswith(b"data: 0\n\n")
    assert second.count(b"\n\n") > 5


def test_bridge_closes_the_apps_generator_while_nobody_reads():
    app = Waiting()

    async def use(thread: AppThread) -> bool:
        exchange = thread.open(AppRequest("GET", "/"))
        await exchange.start()
        exchange.close()
        exchange.close()
        return await asyncio.to_thread(app.closed.wait, 5)

    assert bridged(app, use)


def test_scope_says_asgi_2_3_and_names_the_caller_only_when_there_is_one():
    scope = scope_of(AppRequest("GET", "/a b/ü?x=ü&y=%41", caller="runpod"), "caller.key")
    assert scope["asgi"]["spec_version"] == "2.3"
    assert scope["caller.key"] == "runpod"
    assert Request(scope).query_params["x"] == "ü"
    assert scope["path"] == "/a b/ü"
    assert "caller.key" not in scope_of(AppRequest("GET", "/"), "caller.key")


@pytest.mark.parametrize(
    ("version", "is_tested"), [("1.12.0", True), ("2.0.0rc2", True), ("1.13.0", False), ("1.10.1", False)]
)
def test_sdk_versions_get_the_scaler_that_fits(version, is_tested):
    assert runpy.run_path(str(FOLDER / "handler.py"))["check_version"](version) is is_tested


@pytest.mark.parametrize("version", ["1.9.1", "2.0.0rc3", "2.0.0", "3.1"])
def test_sdk_versions_that_cannot_work_are_refused(version):
    with pytest.raises(ConfigError, match=f"runpod {version} .*install"):
        runpy.run_path(str(FOLDER / "handler.py"))["check_version"](version)


def test_an_unknown_knob_is_refused():
    with pytest.raises(ConfigError, match=r"SERVE_RUNPOD_MOED is not a setting; there are: .*SERVE_RUNPOD_MODE"):
        load_runpod_settings({"SERVE_RUNPOD_MOED": "queue"})


def test_queue_mode_without_a_queue_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SERVE_RUNPOD_MODE", "queue")
    with pytest.raises(ConfigError, match="RUNPOD_WEBHOOK_GET_JOB is not set"):
        load_runpod_settings().resolved_mode({})
    monkeypatch.setenv("SERVE_RUNPOD_MODE", "fast")
    with pytest.raises(ConfigError, match="SERVE_RUNPOD_MODE='fast'"):
        load_runpod_settings()


def test_mode_auto_follows_the_platform():
    settings = load_runpod_settings({})
    assert settings.resolved_mode({"RUNPOD_WEBHOOK_GET_JOB": "http://x"}).value == "queue"
    assert settings.resolved_mode({}).value == "http"


def test_every_wrong_knob_is_named_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SERVE_RUNPOD_MODE", "fast")
    monkeypatch.setenv("SERVE_RUNPOD_DELIVERY_TIMEOUT_S", "-1")
    with pytest.raises(ConfigError) as found:
        load_runpod_settings()
    first, second = found.value.message.splitlines()
    assert first.startswith("SERVE_RUNPOD_MODE='fast': ")
    assert "'auto', 'queue' or 'http'" in first
    assert second.startswith("SERVE_RUNPOD_DELIVERY_TIMEOUT_S='-1': ")
    with pytest.raises(ConfigError, match="SERVE_RUNPOD_A, SERVE_RUNPOD_B are not settings"):
        load_runpod_settings({"SERVE_RUNPOD_A": "", "SERVE_RUNPOD_B": ""})
