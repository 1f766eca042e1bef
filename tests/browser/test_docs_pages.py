"""Swagger UI and ReDoc in Chromium: drawn from the package's files, with the key asked for by the browser itself."""

from __future__ import annotations

import re

import support
from playwright.sync_api import Browser, expect

CREDENTIALS = {"username": "anybody", "password": "sekrit"}


def test_swagger_ui_is_drawn_and_can_try_a_request(open_page):
    with support.serving(api_keys="sekrit") as served:
        page = open_page(served.url, http_credentials=CREDENTIALS)
        page.goto(f"{served.url}/docs")
        expect(page.get_by_text("Answer a conversation", exact=True)).to_be_visible()
        page.get_by_role("button", name="Authorize").first.click()
        page.get_by_label("auth-bearer-value").fill("sekrit")
        page.locator(".auth-btn-wrapper").first.get_by_role("button", name="Apply credentials").click()
        page.get_by_role("button", name="Close").first.click()
        page.locator("#operations-models-list_models .opblock-summary-control").click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        expect(page.locator(".live-responses-table .highlight-code").first).to_contain_text("trimaran")


def test_redoc_is_drawn_from_this_server_alone(browser: Browser):
    """Its script asks for a picture of its maker; the Content-Security-Policy keeps that from leaving."""
    with support.serving(api_keys="sekrit") as served:
        context = browser.new_context(http_credentials={"username": "anybody", "password": "sekrit"})
        page = context.new_page()
        answered: list[str] = []
        page.on("response", lambda response: answered.append(response.url))
        page.goto(f"{served.url}/redoc")
        expect(page.get_by_role("heading", name=re.compile(r"Answer a conversation$"))).to_be_visible()
        page.wait_for_load_state("networkidle")
        context.close()
        assert answered
        assert all(url.startswith(served.url) for url in answered)


def test_docs_page_without_a_key_is_refused(browser: Browser):
    with support.serving(api_keys="sekrit") as served:
        context = browser.new_context(http_credentials={"username": "anybody", "password": "wrong"})
        response = context.new_page().goto(f"{served.url}/docs")
        context.close()
        assert response is not None
        assert response.status == 401
