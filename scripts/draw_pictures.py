"""Draws docs/images for ``scripts/pictures``: the playground on a real server, the architecture from its SVG."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from serve.api.app import create_app
from serve.settings import Settings, load_settings
from trimaran import demo_model

IMAGES = Path(__file__).parent.parent / "docs" / "images"
ARCHITECTURE = IMAGES / "architecture.svg"
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 640}
READY_TIMEOUT_MS = 300_000
ECHOED = "A trimaran has three hulls:\n\n```text\n<=>     outrigger\n<====>  main hull\n<=>     outrigger\n```"
CAPITAL = "What is the capital of France?"
CODE = "Write a Python function that returns the square of a number. Code only."


def main() -> int:
    """Return the exit status: 0 when every picture was drawn."""
    executable = shutil.which("chromium")
    if executable is None:
        print("Chromium is not installed.  Debian, Ubuntu: sudo apt-get install chromium", file=sys.stderr)
        return 1
    IMAGES.mkdir(parents=True, exist_ok=True)
    model = cached_model()
    if model is None:
        print("The demo model is not cached, so the echo engine answers.  For a model: trimaran demo-model")
    settings = load_settings(model=str(model)) if model else load_settings(engine="echo")
    questions = [CAPITAL, CODE] if model else [ECHOED]
    with sync_playwright() as playwright, running_server(settings) as url:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        draw_playground(browser, url, "playground.png", questions, DESKTOP, dark=False)
        draw_playground(browser, url, "playground-dark.png", questions[-1:], PHONE, dark=True)
        draw_architecture(browser)
        browser.close()
    for picture in sorted(IMAGES.glob("*.png")):
        print(f"{picture.relative_to(IMAGES.parent.parent)}  {picture.stat().st_size // 1024} KiB")
    return 0


def cached_model() -> Path | None:
    """The demo model's folder, if it was made before."""
    folder = demo_model.default_cache() / "demo-model" / demo_model.VERSION / demo_model.NAME
    return folder if demo_model.is_complete(folder) else None


@contextmanager
def running_server(settings: Settings) -> Iterator[str]:
    """The real app on a free port; yields its address once the port is open."""
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise SystemExit("The server did not start; its message is above.")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def draw_playground(
    browser: Browser, url: str, name: str, questions: list[str], size: ViewportSize, *, dark: bool
) -> None:
    """Ask ``questions`` and photograph the answers."""
    page = open_page(browser, url + "/", size, dark=dark)
    page.wait_for_selector("#status[data-state=ready]", timeout=READY_TIMEOUT_MS)
    toggle = page.get_by_role("button", name="Settings")  # only narrow windows have it
    if toggle.is_visible():
        toggle.click()
    page.get_by_label("Temperature", exact=True).fill("0")
    page.get_by_label("Max tokens").fill("256")
    if toggle.is_visible():
        toggle.click()
    for question in questions:
        page.get_by_label("Message").fill(question)
        page.get_by_label("Message").press("Enter")
        page.wait_for_selector("article.answer:last-child[aria-busy=false]", timeout=READY_TIMEOUT_MS)
    page.mouse.move(1, 300)  # away from the buttons, which answer to the pointer
    page.screenshot(path=IMAGES / name)


def draw_architecture(browser: Browser) -> None:
    """Render the SVG at its own size."""
    page = open_page(browser, ARCHITECTURE.as_uri(), {"width": 1320, "height": 640}, dark=False)
    page.screenshot(path=IMAGES / "architecture.png", omit_background=True)


def open_page(browser: Browser, url: str, size: ViewportSize, *, dark: bool) -> Page:
    """A page in a context of its own."""
    page = browser.new_page(viewport=size, color_scheme="dark" if dark else "light", reduced_motion="reduce")
    page.goto(url)
    return page


if __name__ == "__main__":
    sys.exit(main())
