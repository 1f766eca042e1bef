"""What the echo engine cannot do on command: bytes cut anywhere, errors in mid-stream, refusals, a strict CSP."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import support
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from playground import ask, finished_answer
from playwright.sync_api import Locator, Page, expect

import serve

PAGE = Path(serve.__path__[0]) / "static" / "playground.html"
STRICT_CSP = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)


def event(**choice) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}, ensure_ascii=False).encode() + b"\n\n"


HELLO = event(delta={"role": "assistant", "content": ""}) + event(delta={"content": "Hi 🚤 "})
END = (
    event(delta={}, finish_reason="stop")
    + b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'
)
DONE = b"data: [DONE]\n\n"


def scripted(*replies: Sequence[bytes] | JSONResponse) -> FastAPI:
    """The page, ready at once; each question gets the next reply, written as the given pieces of bytes."""
    app = FastAPI()
    left = list(replies)

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": STRICT_CSP})

    @app.get("/ready")
    def ready():
        return {"status": "ready", "phase": None}

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": "scripted", "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def chat():
        following = left.pop(0)
        if isinstance(following, JSONResponse):
            return following
        return StreamingResponse(pieces(following), media_type="text/event-stream")

    return app


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        support.eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)


async def pieces(parts: Sequence[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
        await asyncio.sleep(0.03)  # so that the pieces travel apart


def refusal(status: int, code: str, message: str, **headers: str) -> JSONResponse:
    error = {"message": message, "type": "server_error", "code": code, "param": None}
    return JSONResponse({"error": error}, status, headers)


def reply(page: Page) -> Locator:
    ask(page, "hello")
    return finished_answer(page)


def test_playground_reads_events_cut_anywhere_on_the_wire(open_page):
    wire = HELLO + b": keep-alive\n\n" + event(delta={"content": "船👩‍🚀"}).replace(b"\n", b"\r\n") + END + DONE
    emoji = wire.index("🚤".encode())
    cuts = [
        3,
        emoji + 1,
        emoji + 2,
        wire.index(b"keep"),
        wire.index(b"\r") + 1,
        wire.index("👩".encode()) + 6,
        len(wire) - 1,
    ]
    parts = [wire[start:end] for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    with serving(scripted(parts)) as base:
        answer = reply(open_page(base))
        assert answer.locator(".text").inner_text() == "Hi 🚤 船👩‍🚀"
        expect(answer.locator("dl")).to_contain_text("3 in, 7 out")
        expect(answer.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_playground_reads_the_same_events_for_every_cut(open_page, newline):
    wire = (
        b": comment\n\ndata: one \xf0\x9f\x9a\xa4\n\nevent: x\ndata:two\nid: 7\ndata: lines\n\n" + DONE + b":\n"
    ).replace(b"\n", newline)
    cut_everywhere = """async (encoded) => {
      const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
      const read = async (parts) => {
        const stream = new ReadableStream({ start(c) { parts.forEach((part) => c.enqueue(part)); c.close(); } });
        const events = [];
        for await (const event of readEvents(stream)) events.push(event);
        return JSON.stringify(events);
      };
      const seen = new Set([await read([...bytes].map((byte) => Uint8Array.of(byte)))]);
      for (let at = 0; at <= bytes.length; at++) seen.add(await read([bytes.slice(0, at), bytes.slice(at)]));
      return [...seen].map((events) => JSON.parse(events));
    }"""
    with serving(scripted()) as base:
        found = open_page(base).evaluate(cut_everywhere, base64.b64encode(wire).decode())
    assert found == [["one 🚤", "two\nlines", "[DONE]"]]


def test_playground_keeps_the_text_before_an_error_in_mid_stream(open_page):
    error = b'data: {"error": {"message": "The engine died.", "type": "server_error", "code": "engine_dead"}}\n\n'
    with serving(scripted([HELLO, error], [HELLO, END, DONE])) as base:
        page = open_page(base)
        answer = reply(page)
        expect(answer.locator(".text")).to_have_text("Hi 🚤")
        expect(answer.get_by_role("alert")).to_contain_text("The engine died.")
        expect(answer.get_by_role("alert")).to_contain_text("engine_dead")
        page.get_by_role("button", name="Try again").click()
        expect(answer.locator("dl")).to_contain_text("3 in, 7 out")
        expect(page.locator("article")).to_have_count(2)


@pytest.mark.parametrize("parts", [[HELLO], [HELLO, END], [b""]])
def test_playground_says_when_the_stream_ends_too_early(open_page, parts):
    with serving(scripted(parts)) as base:
        expect(reply(open_page(base)).get_by_role("alert")).to_contain_text("closed before the answer was complete")


@pytest.mark.parametrize(("status", "code"), [(429, "rate_limit_exceeded"), (503, "engine_not_ready")])
def test_playground_shows_a_refusal_with_its_wait_and_tries_again(open_page, status, code):
    refused = refusal(status, code, "The queue is full.", **{"Retry-After": "7"})
    with serving(scripted(refused, [HELLO, END, DONE])) as base:
        page = open_page(base)
        alert = reply(page).get_by_role("alert")
        for part in ("The queue is full.", str(status), code, "7 s"):
            expect(alert).to_contain_text(part)
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("article.answer .text")).to_have_text("Hi 🚤")
        expect(page.locator("article.user")).to_have_text(["Youhello"])


def test_playground_survives_a_refusal_that_is_not_json(open_page):
    page_of_a_proxy = JSONResponse(None, 502)
    page_of_a_proxy.body = b"<html>Bad gateway"
    page_of_a_proxy.headers["content-length"] = str(len(page_of_a_proxy.body))
    with serving(scripted(page_of_a_proxy)) as base:
        expect(reply(open_page(base)).get_by_role("alert")).to_contain_text("502")


def test_playground_says_when_the_server_is_gone(open_page):
    with serving(scripted()) as base:
        page = open_page(base)
        expect(page.get_by_role("status")).to_have_text("scripted · ready")
    expect(reply(page).get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.get_by_role("status")).to_contain_text("cannot be reached")


def test_playground_shows_an_engines_phase_and_states(open_page):
    with serving(scripted()) as base:
        page = open_page(base)
        expect(page.get_by_role("status")).to_have_text("scripted · ready")
        for status, phase, text in [
            ("loading", "weights", "Model is loading… (weights)"),
            ("loading", None, "Model is loading…"),
            ("draining", None, "The server is shutting down…"),
            ("dead", None, "The engine has died"),
        ]:
            page.evaluate("server => showStatus(server)", {"status": status, "phase": phase})
            expect(page.get_by_role("status")).to_have_text(text)


def test_playground_holds_no_address_of_another_server():
    text = PAGE.read_text(encoding="utf-8")
    assert "innerHTML" not in text
    assert text.replace("http://www.w3.org/2000/svg", "").count("://") == 0
