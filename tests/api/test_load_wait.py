"""Requests that come before the model: they wait, are answered, or learn why not."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from support import Served, chat, eventually, joined, loading, openai_error, sse_chunks, sse_data

from serve.errors import ModelLoadError

COMPLETIONS = "/v1/chat/completions"


def post(served: Served, text: str = "early", **fields: Any) -> httpx.Response:
    return httpx.post(served.url + COMPLETIONS, json=chat(text, **fields), timeout=30)


def wait_for(served: Served, num_waiting: int) -> None:
    eventually(lambda: served.stats().num_waiting == num_waiting)


def test_load_wait_answers_early_requests_once_loaded() -> None:
    with ThreadPoolExecutor(4) as pool, loading() as (served, gate):
        whole: list[Future[httpx.Response]] = [pool.submit(post, served, f"early {at}") for at in range(2)]
        streams = [pool.submit(post, served, f"stream {at}", stream=True) for at in range(2)]
        wait_for(served, 4)
        assert not any(future.done() for future in (*whole, *streams))

        gate.set()

        for at, future in enumerate(whole):
            assert future.result(30).json()["choices"][0]["message"]["content"] == f"early {at}"
        for at, future in enumerate(streams):
            assert joined(sse_chunks(future.result(30).text)) == f"stream {at}"
        eventually(served.is_idle)


def test_load_wait_sends_comments_to_a_waiting_stream() -> None:
    """Case 17."""
    with (
        loading(keep_alive_s=0.05) as (served, gate),
        httpx.stream("POST", served.url + COMPLETIONS, json=chat("hi", stream=True), timeout=30) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()
        comments = [line for line in (next(lines) for _ in range(6)) if line]
        gate.set()
        rest = "\n".join(lines)

    assert comments == [": keep-alive"] * 3
    assert joined(sse_chunks(rest)) == "hi"
    assert ": keep-alive" not in rest.partition("data: ")[2]


def test_load_wait_ends_with_503_and_an_error_event() -> None:
    with ThreadPoolExecutor(2) as pool, loading(load_wait_s=0.3) as (served, gate):
        whole, stream = pool.submit(post, served), pool.submit(post, served, stream=True)

        response = whole.result(30)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert openai_error(response.json())["code"] == "engine_not_ready"
        assert stream.result(30).status_code == 200
        data = sse_data(stream.result(30).text)
        assert len(data) == 2
        assert openai_error(json.loads(data[0]))["code"] == "engine_not_ready"
        assert data[1] == "[DONE]"

        gate.set()
        eventually(served.is_idle)
        assert post(served).json()["choices"][0]["message"]["content"] == "early"


def test_load_wait_of_zero_answers_at_once() -> None:
    with loading(load_wait_s=0) as (served, _):
        eventually(lambda: served.lifecycle.current_phase == "weights")
        response = post(served)

        assert response.status_code == 503
        assert openai_error(response.json())["code"] == "engine_not_ready"
        eventually(served.is_idle)


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"max_tokens": 0}, 400, None),
        ({"web_search_options": {}}, 400, "unsupported_parameter"),
        ({"max_tokens": 1_000_000}, 400, "context_length_exceeded"),
        ({"model": "other"}, 404, "model_not_found"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_load_wait_spares_invalid_requests(fields: dict[str, Any], status: int, code: str | None, stream: bool) -> None:
    with loading() as (served, _):
        response = httpx.post(served.url + COMPLETIONS, json=chat("a", stream=stream) | fields, timeout=30)

        assert response.status_code == status
        assert openai_error(response.json())["code"] == code
        assert served.lifecycle.state == "loading"


def test_load_wait_limits_the_queue_while_loading() -> None:
    """Case 47."""
    with ThreadPoolExecutor(64) as pool, loading() as (served, gate):
        early = [pool.submit(post, served) for _ in range(64)]
        wait_for(served, 64)
        response = post(served)

        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert openai_error(response.json())["code"] == "rate_limit_exceeded"
        gate.set()
        assert {future.result(30).status_code for future in early} == {200}


def test_load_wait_ends_when_the_client_leaves() -> None:
    with loading() as (served, _):
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(served.url + COMPLETIONS, json=chat("a", stream=stream), timeout=0.3)
            eventually(served.is_idle)


@pytest.mark.parametrize(
    ("failure", "message"),
    [(ModelLoadError("torn weights"), "torn weights"), (MemoryError("too big"), "MemoryError: too big")],
)
def test_load_wait_tells_why_the_load_failed(failure: Exception, message: str) -> None:
    with ThreadPoolExecutor(2) as pool, loading(failure) as (served, gate):
        whole, stream = pool.submit(post, served), pool.submit(post, served, stream=True)
        wait_for(served, 2)

        gate.set()

        response = whole.result(30)
        assert response.status_code == 503
        assert openai_error(response.json())["message"] == message
        data = sse_data(stream.result(30).text)
        assert [openai_error(json.loads(line))["message"] for line in data[:-1]] == [message]
        assert data[-1] == "[DONE]"
        assert served.lifecycle.state == "dead"
        assert httpx.get(served.url + "/health").status_code == 503
        assert served.is_idle()
