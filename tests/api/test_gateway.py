"""The gateway: this server in front of another one, both real."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
import support
from gateways import gateway, response, scripted
from support import Served, chat, eventually, joined, named_events, openai_error, sse_chunks, sse_data

from serve.engine.echo import EchoEngine

COMPLETIONS = "/v1/chat/completions"
REMOTE_KEY, OWN_KEY = "remote-key", "own-key"


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Served, Served, httpx.Client]]:
    """A slow remote with a key, its gateway with another one, and a client of that."""
    with (
        support.serving(EchoEngine(step_s=0.02), api_keys=REMOTE_KEY) as remote,
        gateway(remote.url + "/v1", remote_api_key=REMOTE_KEY, api_keys=OWN_KEY, keep_alive_s=0.1) as (served, client),
    ):
        client.headers["authorization"] = f"Bearer {OWN_KEY}"
        yield remote, served, client


def test_gateway_answers_as_the_remote_does(pair: tuple[Served, Served, httpx.Client]) -> None:
    remote, _, client = pair
    direct = httpx.post(remote.url + COMPLETIONS, json=chat("hello"), headers={"x-api-key": REMOTE_KEY}).json()
    passed = client.post(COMPLETIONS, json=chat("hello")).json()
    same = ("choices", "usage", "model", "object")
    assert {name: passed[name] for name in same} == {name: direct[name] for name in same}
    assert client.get("/v1/models").json()["data"][0]["id"] == "echo"
    assert client.get("/v1/models/echo").json()["id"] == "echo"


def test_openai_client_streams_through_the_gateway(pair: tuple[Served, Served, httpx.Client]) -> None:
    _, served, _ = pair
    with openai.OpenAI(base_url=served.url + "/v1", api_key=OWN_KEY) as client:
        stream = client.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "streamed"}], stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "streamed"


def test_stream_passes_unbuffered_and_unchanged(pair: tuple[Served, Served, httpx.Client]) -> None:
    remote, _, client = pair
    with client.stream("POST", COMPLETIONS, json=chat("x" * 60, stream=True)) as answer:
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        lines = answer.iter_lines()
        begun = [next(lines) for _ in range(5)]
        assert not remote.is_idle(), "the first lines are here while the remote still generates"
        text = "\n".join([*begun, *lines])
    assert joined(sse_chunks(text)) == "x" * 60


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_the_remote(pair: tuple[Served, Served, httpx.Client], stream: bool) -> None:
    remote, served, client = pair
    try:
        if stream:
            with client.stream("POST", COMPLETIONS, json=chat("x" * 2000, stream=True)) as answer:
                lines = answer.iter_lines()  # kept: an iterator that is dropped closes the connection
                next(lines)
                assert not remote.is_idle()
        else:
            client.post(COMPLETIONS, json=chat("x" * 2000), timeout=0.5)
    except httpx.TimeoutException:
        pass
    eventually(remote.is_idle)
    eventually(served.is_idle)


def test_keys_of_both_sides_stay_apart(pair: tuple[Served, Served, httpx.Client]) -> None:
    _, served, _ = pair
    assert httpx.post(served.url + COMPLETIONS, json=chat("a")).status_code == 401
    wrong = httpx.post(served.url + COMPLETIONS, json=chat("a"), headers={"x-api-key": REMOTE_KEY})
    assert openai_error(wrong.json())["code"] == "invalid_api_key"
    assert httpx.get(served.url + "/health").json()["status"] == "ready"
    with gateway(pair[0].url, remote_api_key="wrong") as (_, client):
        refused = client.post(COMPLETIONS, json=chat("a"))
    assert refused.status_code == 502
    assert "SERVE_REMOTE_API_KEY" in openai_error(refused.json())["message"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "other", "messages": [{"role": "user", "content": "a"}]}, 404, "model_not_found"),
        ({"model": "echo", "messages": []}, 400, None),
        ({"model": "other", "messages": [{"role": "user", "content": "a"}], "stream": True}, 404, "model_not_found"),
    ],
)
def test_errors_of_the_remote_pass_with_their_status(
    pair: tuple[Served, Served, httpx.Client], body: dict[str, Any], status: int, code: str | None
) -> None:
    answer = pair[2].post(COMPLETIONS, json=body)
    assert (answer.status_code, openai_error(answer.json())["code"]) == (status, code)


def test_gateway_checks_bodies_itself(pair: tuple[Served, Served, httpx.Client]) -> None:
    client = pair[2]
    headers = {"content-type": "application/json"}
    assert client.post(COMPLETIONS, content=b"{", headers=headers).status_code == 400
    assert client.post(COMPLETIONS, content=b"[]", headers=headers).status_code == 400
    assert client.post(COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get("/v1/models/%2e%2e/%2e%2e/health").status_code == 404
    assert COMPLETIONS in client.get("/openapi.json").json()["paths"]


def test_cold_remote_is_asked_again_and_streams_get_comments() -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"late"}}]}\n\ndata: [DONE]\n\n'
    warm, cold = response("200 OK", event, content_type="text/event-stream"), response("503 Cold")
    with scripted(cold, cold, warm) as url, gateway(url, keep_alive_s=0.1) as (_, client):
        text = client.post(COMPLETIONS, json=chat("late", stream=True)).text
    assert text.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert text.endswith(event.decode())


def test_cold_remote_is_waited_for_by_a_plain_request() -> None:
    with support.loading(load_wait_s=0.0) as (remote, gate), gateway(remote.url) as (_, client):
        threading.Timer(0.5, gate.set).start()
        assert client.post(COMPLETIONS, json=chat("late")).json()["choices"][0]["message"]["content"] == "late"


@pytest.mark.parametrize("answers", [[response("503 Cold")], [response("502 Booting", b"<html>")]])
def test_remote_that_stays_cold_is_told_at_the_deadline(answers: list[bytes]) -> None:
    with scripted(*answers) as url, gateway(url, load_wait_s=0.3, keep_alive_s=0.05) as (served, client):
        plain = client.post(COMPLETIONS, json=chat("a"))
        assert (plain.status_code, plain.headers["retry-after"]) == (503, "10")
        assert openai_error(plain.json())["code"] == "engine_not_ready"
        streamed = client.post(COMPLETIONS, json=chat("a", stream=True))
        assert streamed.text.startswith(": keep-alive\n\n")
        error, done = sse_data(streamed.text)
        assert (openai_error(json.loads(error))["code"], done) == ("engine_not_ready", "[DONE]")
        assert served.is_idle()


def test_address_where_nothing_listens_is_a_cold_remote() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with gateway(f"http://127.0.0.1:{port}", load_wait_s=0.0) as (_, client):
        assert client.post(COMPLETIONS, json=chat("a")).status_code == 503


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (response("404 Not Found", b"modal-http: app for invoked web endpoint is stopped"), 502, "app for invoked"),
        (response("429 Too Many", b"slow down", retry_after="7"), 429, "takes no more"),
        (response("500 Oh", b"{}"), 502, "answered 500"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort", 502, "broke off"),
    ],
)
def test_pages_of_platforms_become_errors_of_ours(answer: bytes, status: int, words: str) -> None:
    with scripted(answer) as url, gateway(url, load_wait_s=0.0) as (_, client):
        for stream in (False, True) if status != 502 or b"short" not in answer else (False,):
            got = client.post(COMPLETIONS, json=chat("a", stream=stream))
            assert got.status_code == status
            assert words in openai_error(got.json())["message"]
            assert got.headers.get("retry-after") == ("7" if status == 429 else None)


def test_stream_that_breaks_off_ends_with_an_error_event() -> None:
    event = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    broken = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n" + event
    with scripted(broken) as url, gateway(url) as (_, client):
        first, error, done = sse_data(client.post(COMPLETIONS, json=chat("a", stream=True)).text)
    assert json.loads(first)["choices"][0]["delta"]["content"] == "a"
    assert (openai_error(json.loads(error))["code"], done) == ("upstream_failed", "[DONE]")


def test_message_stream_that_breaks_off_ends_as_anthropics_clients_read_it() -> None:
    event = b'event: ping\ndata: {"type":"ping"}\n\n'
    broken = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\n" + event
    with scripted(broken) as url, gateway(url) as (_, client):
        response = client.post("/v1/messages", json=chat("a", stream=True, max_tokens=9))
    ping, error = named_events(response.text)
    assert ping == {"type": "ping"}
    assert (error["type"], error["request_id"]) == ("error", response.headers["request-id"])
    assert error["error"]["type"] == "api_error"


def test_no_more_requests_pass_than_allowed() -> None:
    with support.loading(load_wait_s=60) as (remote, gate), gateway(remote.url, max_queue=1) as (served, client):
        thread = threading.Thread(target=lambda: client.post(COMPLETIONS, json=chat("first")))
        thread.start()
        eventually(lambda: served.stats().num_running == 1)
        refused = httpx.post(served.url + COMPLETIONS, json=chat("second"))
        assert (refused.status_code, openai_error(refused.json())["code"]) == (429, "rate_limit_exceeded")
        gate.set()
        thread.join()


def test_gateway_drains_its_streams() -> None:
    with (
        support.serving(EchoEngine(step_s=0.02)) as remote,
        support.running(SERVE_ENGINE="remote", SERVE_REMOTE_URL=remote.url) as process,
        httpx.Client(base_url=process.url, timeout=30) as client,
    ):
        with client.stream("POST", COMPLETIONS, json=chat("x" * 60, stream=True)) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.process.terminate()
            assert joined(sse_chunks("\n".join([first, *lines]))) == "x" * 60
        assert process.process.wait(10) == 0


def test_gateway_ends_its_streams_at_the_drains_deadline() -> None:
    with (
        support.serving(EchoEngine(step_s=0.02)) as remote,
        support.running(SERVE_ENGINE="remote", SERVE_REMOTE_URL=remote.url, SERVE_DRAIN_TIMEOUT_S="0.2") as process,
        httpx.Client(base_url=process.url, timeout=30) as client,
    ):
        began = time.perf_counter()
        with client.stream("POST", COMPLETIONS, json=chat("x" * 2000, stream=True)) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.process.terminate()
            *_, error, done = sse_data("\n".join([first, *lines]))
        assert (openai_error(json.loads(error))["code"], done) == ("shutting_down", "[DONE]")
        assert process.process.wait(10) == 0
        assert time.perf_counter() - began < 15
        eventually(remote.is_idle)
