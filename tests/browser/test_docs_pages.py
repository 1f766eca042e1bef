"""Swagger UI and ReDoc in Chromium: drawn from the package's files, with the key asked for by the browser itself."""

from __future__ import annotations

import pytest
import support
from playwright.sync_api import expect

CREDENTIALS = {"username": "anybody", "password": "sekrit"}


@pytest.mark.parametrize("path", ["docs", "redoc"])
def test_docs_page_is_drawn_offline_with_the_key_as_basic_password(open_page, path):
    with support.serving(api_keys="sekrit") as served:
        page = open_page(served.url, http_credentials=CREDENTIALS)
        page.goto(f"{served.url}/{path}")
        expect(page.get_by_text("Answer a conversation").first).to_be_visible()
        expect(page.get_by_text("/v1/models/{model}").first).to_be_attached()


def test_docs_page_can_try_a_request_with_a_key(open_page):
    with support.serving(api_keys="sekrit") as served:
        page = open_page(served.url, http_credentials=CREDENTIALS)
        page.goto(f"{served.url}/docs")
        page.get_by_role("button", name="Authorize").first.click()
        page.get_by_label("auth-bearer-value").fill("sekrit")
        page.locator(".auth-btn-wrapper button", has_text="Authorize").first.click()
        page.locator(".modal-ux .btn-done").first.click()
        page.locator("#operations-models-list_models").click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        expect(page.locator(".live-responses-table .response .microlight").first).to_contain_text("trimaran")
