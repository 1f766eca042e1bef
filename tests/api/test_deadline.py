"""``SERVE_REQUEST_DEADLINE_S``: what still runs then ends, with an error that says so, and its slot is free."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from support import Served, chat, eventually, loading, message_error, named_events, openai_error, serving, sse_data

from serve.engine.base import EngineConfig
from serve.engine.echo import EchoEngine

COMPLETIONS = "/v1/chat/completions"
DEADLINE_S = 0.3
LONG = "x" * 4000  # at 10 ms for each token


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(EchoEngine(EngineConfig(), step_s=0.01), request_deadline_s=DEADLINE_S) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=20) as client:
        yield client


@pytest.mark.parametrize("fields", [{}, {"n": 3}])
def test_deadline_answers_504_to_who_waits_for_all(
    served: Served, client: httpx.Client, fields: dict[str, Any]
) -> None:
    began = time.perf_counter()
    answer = client.post(COMPLETIONS, json=chat(LONG, **fields))

    error = openai_error(answer.json())
    assert (answer.status_code, error["code"]) == (504, "deadline_exceeded")
    assert "0.3 s" in error["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert DEADLINE_S <= time.perf_counter() - began < 10
    eventually(served.is_idle)
    assert client.post(COMPLETIONS, json=chat("ab")).status_code == 200


@pytest.mark.parametrize("fields", [{}, {"n": 3}])
def test_deadline_ends_a_stream_with_an_error_event(
    served: Served, client: httpx.Client, fields: dict[str, Any]
) -> None:
    answer = client.post(COMPLETIONS, json=chat(LONG, stream=True, **fields))

    data = sse_data(answer.text)
    assert answer.status_code == 200
    assert data[-1] == "[DONE]"
    assert openai_error(json.loads(data[-2]))["code"] == "deadline_exceeded"
    assert len(data) > 5
    eventually(served.is_idle)


def test_deadline_speaks_each_wire(client: httpx.Client) -> None:
    answer = client.post("/v1/messages", json={**chat(LONG), "max_tokens": 4000})
    assert (answer.status_code, message_error(answer)["type"]) == (504, "timeout_error")
    events = named_events(client.post("/v1/messages", json={**chat(LONG), "max_tokens": 4000, "stream": True}).text)
    assert events[-1]["error"]["type"] == "timeout_error"
    answer = client.post("/v1/responses", json={"model": "echo", "input": LONG})
    assert (answer.status_code, openai_error(answer.json())["code"]) == (504, "deadline_exceeded")


def test_deadline_counts_the_wait_for_a_slot() -> None:
    engine = EchoEngine(EngineConfig(max_batch_size=1), step_s=0.01)
    with serving(engine, request_deadline_s=DEADLINE_S) as served, httpx.Client(base_url=served.url) as client:

        async def ask_at_once() -> list[int]:
            async with httpx.AsyncClient(base_url=served.url, timeout=20) as asking:
                asked = [asking.post(COMPLETIONS, json=chat(LONG)) for _ in range(3)]
                return [answer.status_code for answer in await asyncio.gather(*asked)]

        assert asyncio.run(ask_at_once()) == [504] * 3
        assert client.post(COMPLETIONS, json=chat("a")).status_code == 200


def test_deadline_bounds_the_wait_for_the_model() -> None:
    with loading(request_deadline_s=DEADLINE_S) as (served, _), httpx.Client(base_url=served.url) as client:
        answer = client.post(COMPLETIONS, json=chat("a"))
    assert (answer.status_code, answer.json()["error"]["code"]) in [
        (503, "engine_not_ready"),
        (504, "deadline_exceeded"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_deadline_holds_in_a_gateway(stream: bool) -> None:
    with (
        serving(EchoEngine(EngineConfig(), step_s=0.01)) as remote,
        serving(engine="remote", remote_url=remote.url, request_deadline_s=DEADLINE_S) as gateway,
        httpx.Client(base_url=gateway.url, timeout=20) as client,
    ):
        answer = client.post(COMPLETIONS, json=chat(LONG, stream=stream))
        if stream:
            assert openai_error(json.loads(sse_data(answer.text)[-2]))["code"] == "deadline_exceeded"
        else:
            assert (answer.status_code, openai_error(answer.json())["code"]) == (504, "deadline_exceeded")
        eventually(remote.is_idle)


def test_deadline_holds_for_embeddings(demo_embedding: Path) -> None:
    settings: dict[str, Any] = {"embedding_model": str(demo_embedding), "request_deadline_s": 0.02}
    with serving(**settings) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        eventually(lambda: served.lifecycle.embeddings is not None and served.lifecycle.embeddings.is_loaded, 50)
        body = {"model": served.app.state.settings.embedding_name, "input": ["word " * 200] * 64}
        answer = client.post("/v1/embeddings", json=body)
    assert (answer.status_code, openai_error(answer.json())["code"]) == (504, "deadline_exceeded")
