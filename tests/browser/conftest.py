"""A real Chromium, and pages that fail the test when they leave the server or throw."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import support
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, sync_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

OpenPage = Callable[..., Page]


# The sync API keeps an event loop in this thread: no wider than a module, or async tests elsewhere would meet it.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        support.missing("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """``open_page(base_url, **context_options)``; afterwards: no foreign request, no script error, no dialog."""
    contexts = []
    requested: list[tuple[str, str]] = []
    problems: list[str] = []

    def note(console: ConsoleMessage) -> None:
        if "Content Security Policy" in console.text:
            problems.append(console.text)

    def refuse(dialog: Dialog) -> None:
        problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open_(base_url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.on("request", lambda request: requested.append((base_url, request.url)))
        context.on("console", note)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", refuse)
        page.goto(base_url + "/")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems
    foreign = [
        url for base, url in requested if not url.startswith("data:") and urlsplit(url).netloc != urlsplit(base).netloc
    ]
    assert foreign == []
