"""Pages for people work without the internet."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import httpx2 as httpx
import pytest

PAGES = ["/", "/docs", "/redoc"]
LOADED = re.compile(r"""(?:\bsrc|\bhref|\baction|\bspec-url)\s*=\s*["']?([^"'\s>]+)|url\(\s*["']?([^"')]+)""")


def loaded(page: str) -> list[str]:
    """What a browser would fetch for a page."""
    return [first or second for first, second in LOADED.findall(page)]


@pytest.mark.parametrize("path", PAGES)
def test_docs_pages_load_nothing_from_elsewhere(client: httpx.Client, path: str) -> None:
    response = client.get(path)

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    for link in loaded(response.text):
        assert not link.startswith(("http:", "https:", "//")), link
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_docs_pages_have_their_assets(client: httpx.Client, path: str) -> None:
    page = client.get(path).text
    assets = {link for link in loaded(page) if link.startswith("/docs/assets/")}

    assert assets
    assert "/openapi.json" in page
    for asset in assets:
        response = client.get(urljoin(path, asset))
        assert response.status_code == 200, asset
        assert len(response.content) > 500


@pytest.mark.parametrize(
    "path", ["/docs/assets/../../app.py", "/docs/assets/..%2f..%2f__init__.py", "/docs/assets/%2fetc/passwd"]
)
def test_docs_pages_assets_stay_in_their_folder(client: httpx.Client, path: str) -> None:
    response = client.get(path)

    assert response.status_code == 404
    assert set(response.json()) == {"error"}


@pytest.mark.parametrize("path", [*PAGES, "/openapi.json"])
def test_docs_pages_answer_head(client: httpx.Client, path: str) -> None:
    """Case 48."""
    response = client.head(path)

    assert (response.status_code, response.content) == (200, b"")
