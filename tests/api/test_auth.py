"""Keys: what is open, what is not, and in which headers a key may come."""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import support
from support import chat, message_error, openai_error, running, serving

from serve.keys import KeyRing, environment_key

OPEN = {"/health", "/ready", "/ping", "/"}
KEY, OTHER = "sk-first", "schlüssel:zwei"


@pytest.fixture(scope="module")
def locked() -> Iterator[support.Served]:
    """A server with two keys."""
    with serving(api_keys=f"{KEY}, {OTHER}") as served:
        yield served


@pytest.fixture(scope="module")
def client(locked: support.Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked.url) as client:
        yield client


def routes(found: Any) -> Iterator[tuple[str, set[str]]]:
    """Path and methods of every route, those of included routers too."""
    for route in found.routes:
        if hasattr(route, "path"):
            is_socket = type(route).__name__.endswith("WebSocketRoute")
            yield route.path, {"WEBSOCKET"} if is_socket else set(getattr(route, "methods", None) or {"GET"})
        if inner := getattr(route, "original_router", None):
            yield from routes(inner)


def handshake_status(served: support.Served, path: str, headers: str = "", host: str = "a") -> int:
    """What a WebSocket's handshake gets."""
    handshake = (
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as client:
        client.sendall(handshake.encode())
        return int(client.makefile("rb").readline().split()[1])


def test_auth_closes_every_route_but_the_open_ones(locked: support.Served, client: httpx.Client) -> None:
    """Case 50."""
    known = dict(routes(locked.app))
    assert set(known) >= {"/v1/chat/completions", "/v1/models", "/docs", "/openapi.json", "/version", *OPEN}
    assert set(known) >= {"/v1/messages", "/v1/responses", "/v1/responses/{response_id}", "/v1/responses/input_tokens"}
    assert known["/v1/realtime/chat"] == {"WEBSOCKET"}

    for path, methods in known.items():
        for method in methods:
            if method == "WEBSOCKET":
                assert handshake_status(locked, path) == 401, path
                continue
            response = client.request(method, re.sub(r"{.*?}", "x", path))
            if path in OPEN:
                assert response.status_code == 200, path
            else:
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"]
                if method != "HEAD" and path.startswith("/v1/messages"):
                    assert message_error(response)["type"] == "authentication_error"
                elif method != "HEAD":
                    openai_error(response.json())


@pytest.mark.parametrize(
    "path",
    ["/nope", "//v1/models", "/%2e/health", "/health/", "/health/../v1/models", "/Health", "/health%2f", "/health;a",
     "/health%00", "//health", "/v1/models?a=/health", "/metrics", "/docs/assets/swagger-ui.css", "/v1/models%2f"],
)  # fmt: skip
def test_auth_closes_unknown_and_disguised_paths(locked: support.Served, path: str) -> None:
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        assert client.makefile("rb").readline().split()[1] == b"401"


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "PATCH", "TRACE"])
def test_auth_closes_every_method(client: httpx.Client, method: str) -> None:
    assert client.request(method, "/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer  {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"x-api-key": OTHER.encode()}, 200),
        ({"authorization": b"Bearer " + OTHER.encode()}, 200),
        ({"x-api-key": KEY, "authorization": "Bearer wrong"}, 200),
        ({"x-api-key": "wrong", "authorization": f"Bearer {KEY}"}, 401),
        ({}, 401),
        ({"x-api-key": ""}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"authorization": f"Bearer {KEY}, {KEY}"}, 401),
        ({"x-api-key": f"{KEY},{OTHER}".encode()}, 401),
        ({"x-api-key": b"\xff\xfe"}, 401),
        ({"authorization": "Bearer ключ".encode()}, 401),
        ({"x-api-key": "k" * 60_000}, 401),
    ],
)
def test_auth_reads_the_key_from_its_headers(client: httpx.Client, headers: dict[str, Any], status: int) -> None:
    response = client.get("/v1/models", headers=headers)

    assert response.status_code == status
    if status == 401:
        error = openai_error(response.json())
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert KEY not in response.text


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/docs/assets/swagger-ui.css"])
def test_auth_takes_basic_on_the_documentation(client: httpx.Client, path: str) -> None:
    asked = client.get(path)

    assert asked.status_code == 401
    assert asked.headers["www-authenticate"].startswith("Basic realm=")
    assert client.get(path, auth=("anyone", KEY)).status_code == 200
    assert client.get(path, auth=("anyone", OTHER)).status_code == 200
    assert client.get(path, auth=("anyone", "wrong")).status_code == 401
    assert client.get(path, headers={"authorization": "Basic !"}).status_code == 401
    no_utf8 = base64.b64encode(b"u:\xff").decode()
    assert client.get(path, headers={"authorization": f"Basic {no_utf8}"}).status_code == 401


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/docsx", "/v1/docs", "/docs/../v1/models"])
def test_auth_never_takes_basic_elsewhere(client: httpx.Client, path: str) -> None:
    response = client.get(path, auth=("anyone", KEY))

    assert response.status_code == 401
    assert "Basic" not in response.headers["www-authenticate"]
    assert client.post("/v1/chat/completions", json=chat("a"), auth=("anyone", KEY)).status_code == 401


@pytest.mark.parametrize("path", ["/v1/realtime/chat", "/v1/realtime", "/health/", "/nope"])
def test_auth_refuses_a_websocket_without_a_key(locked: support.Served, path: str) -> None:
    for headers in ("", "X-API-Key: wrong\r\n", "Sec-WebSocket-Protocol: trimaran.key.d3Jvbmc\r\n"):
        assert handshake_status(locked, path, headers) == 401


def test_auth_answers_before_a_body_arrives(locked: support.Served) -> None:
    with socket.create_connection(("127.0.0.1", locked.port), timeout=10) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
        assert client.makefile("rb").readline().split()[1] == b"401"


def test_auth_keeps_nothing_of_an_unwelcome_body() -> None:
    """128 MB without a key leave the process as small as it was."""
    if not Path("/proc/self/status").exists():
        support.missing("there is no /proc here: run on Linux")
    with running(SERVE_API_KEYS=KEY) as server:
        port = int(server.url.rpartition(":")[2])
        status = Path(f"/proc/{server.process.pid}/status")

        def peak_kb() -> int:
            return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])

        assert httpx.get(server.url + "/v1/models").status_code == 401
        before = peak_kb()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 134217728\r\n\r\n")
            try:
                for _ in range(128):
                    client.sendall(b"x" * 2**20)
            except OSError:
                pass  # closing is as good as discarding
        assert httpx.get(server.url + "/health").status_code == 200
        assert peak_kb() - before < 32 * 1024


def test_auth_lets_everyone_in_without_keys(echo: support.Served) -> None:
    headers = {"authorization": "Bearer anything"}  # clients send a placeholder

    assert httpx.get(echo.url + "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "is_let_in"),
    [
        ("localhost:8000", True),
        ("127.0.0.1:1", True),
        ("[::1]:8000", True),
        ("10.1.2.3", True),
        ("playground.localhost", True),
        ("box", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("evil.example.:8000", False),
        ("[::1", False),
    ],
)
def test_server_without_keys_answers_under_no_name_that_others_may_own(
    echo: support.Served, host: str, is_let_in: bool
) -> None:
    """DNS rebinding: a page's own name is made to lead to this machine, and its script is of our origin then."""
    with httpx.Client(base_url=echo.url, headers={"host": host, "origin": f"http://{host}"}) as client:
        answers = [client.get("/v1/models"), client.post("/v1/chat/completions", json=chat("a"))]
        assert client.get("/health").status_code == 200
    status = handshake_status(echo, "/v1/realtime/chat", host=host)

    assert [answer.status_code for answer in answers] == ([200, 200] if is_let_in else [403, 403])
    assert status == (101 if is_let_in else 403)
    if not is_let_in:
        assert "SERVE_API_KEYS" in openai_error(answers[0].json())["message"]


def test_server_for_everyone_or_with_keys_answers_under_any_name(locked: support.Served) -> None:
    headers = {"host": "my.server.example", "x-api-key": KEY}
    assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 200
    with serving(allow_anonymous=True) as served:
        assert httpx.get(served.url + "/v1/models", headers=headers).status_code == 200


def test_auth_names_a_caller_without_telling_the_key() -> None:
    keys = KeyRing([environment_key(KEY), environment_key(OTHER)])

    callers = {keys.identify(key.encode()).caller for key in (KEY, OTHER)}

    assert len(callers) == 2
    assert not any(KEY in caller or OTHER in caller for caller in callers)
