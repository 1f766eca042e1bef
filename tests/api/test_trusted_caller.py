"""An adapter in this process may name its caller; nobody who comes over HTTP can."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2 as httpx
from support import serving

from serve.api.app import create_app
from serve.api.auth import TRUSTED_CALLER
from serve.settings import Settings


def statuses(scope: dict[str, Any]) -> list[int]:
    """What the app answers to a request in process."""
    app = create_app(Settings(engine="echo", api_keys="secret", _env_file=None))  # pyright: ignore[reportCallIssue, reportArgumentType]
    seen: list[int] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            seen.append(message["status"])

    base: dict[str, Any] = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b"", "headers": []}
    asyncio.run(app({**base, **scope}, receive, send))
    return seen


def test_a_scope_that_names_its_caller_needs_no_key():
    assert statuses({}) == [401]
    assert statuses({TRUSTED_CALLER: ""}) == [401]
    assert statuses({TRUSTED_CALLER: "runpod"}) == [200]


def test_no_part_of_a_request_names_its_caller():
    with serving(api_keys="secret") as served, httpx.Client(base_url=served.url) as client:
        for headers in ({TRUSTED_CALLER: "runpod"}, {"trimaran_caller": "runpod"}, {"x-trimaran-caller": "runpod"}):
            assert client.get("/v1/models", headers=headers).status_code == 401
        assert client.get("/v1/models", params={TRUSTED_CALLER: "runpod"}).status_code == 401
        assert client.post(f"/v1/models?{TRUSTED_CALLER}=runpod", json={TRUSTED_CALLER: "runpod"}).status_code == 401
