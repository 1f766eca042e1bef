"""The page of ``examples/`` that chats over a WebSocket."""

from __future__ import annotations

from pathlib import Path

import support
from playwright.sync_api import Browser, expect

PAGE = Path(__file__).parents[2] / "examples" / "websocket.html"


def test_websocket_page_chats_with_a_key(browser: Browser) -> None:
    with support.serving(api_keys="sk-right") as served:
        page = browser.new_page()
        page.goto(f"{PAGE.as_uri()}?server={served.url.replace('http', 'ws', 1)}&model=echo")
        page.fill("#key", "sk-right")
        for question in ("héllo 👋", "again"):
            page.fill("#text", question)
            page.get_by_text("Ask").click()
            expect(page.locator("#log")).to_contain_text(f"> {question}\n{question} [done]")
        page.close()


def test_websocket_page_shows_refusals(browser: Browser) -> None:
    with support.serving(api_keys="sk-right") as served:
        page = browser.new_page()
        page.goto(f"{PAGE.as_uri()}?server={served.url.replace('http', 'ws', 1)}&model=other")
        page.get_by_text("Ask").click()
        expect(page.locator("#log")).to_contain_text("the server refused the connection")
        page.fill("#key", "sk-right")
        page.get_by_text("Ask").click()
        expect(page.locator("#log")).to_contain_text("[404] model 'other' is not served here")
        page.close()
