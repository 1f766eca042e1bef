"""What is reachable at all: keys on every route, no foreign pages, one socket, headers of pages."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from attack import COMPLETIONS, KEY, Target, only_here
from support import eventually

OPEN = {"/health", "/ready", "/ping", "/"}
WRONG = ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"authorization": "Basic d3Jvbmc6d3Jvbmc="})


def test_every_documented_route_wants_a_key(target: Target) -> None:
    document = target.client.get("/openapi.json").json()
    places = [(path, method) for path, methods in document["paths"].items() for method in methods]
    assert len(places) >= 8
    for path, method in places:
        if path in OPEN:
            continue
        for headers in WRONG:
            url = target.url + re.sub(r"{.*?}", "x", path)
            answer = target.client.request(method, url, headers={"authorization": "", **headers})
            assert answer.status_code == 401, (method, path, headers)
            assert "www-authenticate" in answer.headers


@pytest.mark.parametrize(
    "path",
    ["/docs", "/redoc", "/openapi.json", "/metrics", "/version", "//v1/models", "/v1/models%2f", "/%2e/v1/models",
     "/health/../v1/models", "/docs/assets/swagger-ui.css", "/.env", "/admin", "/v1/models;/health", "/debug/pprof"],
)  # fmt: skip
def test_no_path_leads_around_the_key(target: Target, path: str) -> None:
    """CVE-2026-24207 and its like."""
    assert target.client.get(target.url + path, headers={"authorization": ""}).status_code == 401


@pytest.mark.parametrize(
    "path",
    ["/docs/assets/%2e%2e/%2e%2e/%2e%2e/METADATA", "/docs/assets/..%2f..%2fetc/passwd", "/v1/models/..%2f..%2fetc"],
)
def test_no_path_leads_out_of_the_folder(target: Target, path: str) -> None:
    answer = target.client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
def test_pages_of_other_origins_are_not_let_in(target: Target, origin: str) -> None:
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answers = [
        target.client.request("OPTIONS", COMPLETIONS, headers=preflight),
        target.client.get("/v1/models", headers={"origin": origin}),
        target.client.get("/health", headers={"origin": origin}),
    ]
    for answer in answers:
        allowed = answer.headers.get("access-control-allow-origin")
        assert allowed is None, "CORS is off unless the operator names the origin"
        assert answer.headers.get("access-control-allow-credentials") is None


@pytest.mark.parametrize("page", ["/", "/docs", "/redoc"])
def test_pages_forbid_frames_and_foreign_code(target: Target, page: str) -> None:
    answer = target.client.get(page)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "http" not in policy, "nothing from the internet"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", COMPLETIONS])
def test_answers_say_nothing_of_the_software(target: Target, path: str) -> None:
    answer = target.client.get(path)
    assert "server" not in answer.headers or not re.search(r"\d", answer.headers["server"])
    assert "x-powered-by" not in answer.headers
    for word in ("Traceback", "site-packages", "/usr/lib", KEY):
        assert word not in answer.text


@only_here
def test_nothing_listens_but_the_one_port(target: Target) -> None:
    """CVE-2025-32444, ShadowMQ: pickles on sockets that nobody knew of."""
    process = Path(f"/proc/{target.process.process.pid}")
    sockets = {os.readlink(fd) for fd in (process / "fd").iterdir() if os.readlink(fd).startswith("socket:")}  # noqa: PTH115
    listening: list[int] = []
    for table in ("tcp", "tcp6"):
        for line in (process / "net" / table).read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.append(int(fields[1].rpartition(":")[2], 16))
    assert listening == [target.address[1]]


@only_here
def test_refused_sockets_are_no_errors_in_the_log(target: Target) -> None:
    """Anybody could write as many as they like."""
    wish = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    wish |= {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==", "authorization": ""}
    assert target.client.get("/v1/realtime/chat", headers=wish).status_code == 401
    eventually(lambda: "/v1/realtime/chat" in target.process.log)
    assert "completing handshake" not in target.process.log


@only_here
def test_prompts_are_not_logged(target: Target) -> None:
    secret = "a-very-private-sentence"
    target.client.post(COMPLETIONS, json=target.chat(secret))
    target.client.post(COMPLETIONS, json=target.chat(secret, temperature=99))
    target.client.post(
        COMPLETIONS, content=f'{{"model": "{secret}'.encode(), headers={"content-type": "application/json"}
    )
    assert secret not in target.process.log
