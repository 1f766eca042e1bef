"""Pages of other origins: shut out, unless they are named; never with a browser's own credentials."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import pytest
from support import chat, serving

from serve.errors import ConfigError
from serve.settings import load_settings

PATH, PAGE = "/v1/chat/completions", "https://app.example"


def preflight(url: str, origin: str, **more: str) -> Any:
    # As openai's and anthropic's clients for pages ask.
    wanted = "authorization,content-type,x-stainless-lang,openai-beta,anthropic-dangerous-direct-browser-access"
    asked = {"access-control-request-method": "POST", "access-control-request-headers": wanted}
    return httpx.request("OPTIONS", url + PATH, headers={"origin": origin, **asked, **more})


@pytest.mark.parametrize("allowed", [PAGE, f"http://localhost:3000, {PAGE}", "*"])
def test_cors_lets_named_pages_read(allowed: str) -> None:
    with serving(cors_origins=allowed, api_keys="k") as served:
        asked = preflight(served.url, PAGE)
        assert asked.status_code == 200, "a preflight carries no key"
        assert asked.headers["access-control-allow-origin"] in {PAGE, "*"}
        for name in ("authorization", "x-stainless-lang", "anthropic-dangerous-direct-browser-access"):
            assert name in asked.headers["access-control-allow-headers"]
        headers = {"origin": PAGE, "authorization": "Bearer k"}
        for stream in (False, True):
            answer = httpx.post(served.url + PATH, json=chat("hi", stream=stream), headers=headers)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] in {PAGE, "*"}
            assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
            assert "access-control-allow-credentials" not in answer.headers | asked.headers
        refused = httpx.post(served.url + PATH, json=chat("hi"), headers={"origin": PAGE})
        assert refused.status_code == 401
        assert "access-control-allow-origin" in refused.headers, "else the page cannot see why"
        if allowed != "*":
            assert "access-control-allow-origin" not in preflight(served.url, "https://evil.example").headers
            foreign = httpx.get(served.url + "/health", headers={"origin": f"{PAGE}.evil.example"})
            assert "access-control-allow-origin" not in foreign.headers


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://a.b/c", "https://*.b", "null", "file://"]
)
def test_cors_origins_are_checked(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    monkeypatch.setenv("SERVE_ENGINE", "echo")
    monkeypatch.setenv("SERVE_CORS_ORIGINS", f"https://fine.example,{origin}")
    with pytest.raises(ConfigError, match="is no origin: write scheme and host only"):
        load_settings()
