"""What a person does on the playground, for the browser tests."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect


def ask(page: Page, text: str) -> None:
    """Type a question and press Enter."""
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def answer(page: Page) -> Locator:
    """The newest answer, finished or not."""
    return page.locator("article.answer").last


def finished_answer(page: Page) -> Locator:
    """The newest answer, once it has ended one way or another."""
    expect(answer(page)).to_have_attribute("aria-busy", "false")
    return answer(page)


def expect_answer(page: Page, text: str) -> None:
    """Wait for the newest answer's end and compare its text, white space aside."""
    expect(finished_answer(page).locator(".text")).to_have_text(text)
