"""SageMaker's one route: the same answers as each body's own route, here and through a gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import support
from gateways import gateway
from support import Served, chat, eventually, joined, named_events, openai_error, sse_chunks

from serve.engine.echo import EchoEngine

INVOCATIONS = "/invocations"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with support.serving(EchoEngine(step_s=0.005), api_keys="key") as served:
        yield served


@pytest.fixture(scope="module", params=["direct", "gateway"])
def client(request: pytest.FixtureRequest, served: Served) -> Iterator[httpx.Client]:
    if request.param == "gateway":
        with gateway(served.url, remote_api_key="key") as (_, client):
            yield client
    else:
        with httpx.Client(base_url=served.url, headers={"x-api-key": "key"}, timeout=30) as client:
            yield client


def text_of(answer: Any) -> str:
    if answer["object"] == "response":
        return answer["output"][0]["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["message"]["content"] if answer["object"] == "chat.completion" else choice["text"]


@pytest.mark.parametrize(
    "body", [chat("same"), {"model": "echo", "prompt": "same"}, {"model": "echo", "input": "same"}]
)
def test_body_goes_to_its_own_route(client: httpx.Client, body: dict[str, Any]) -> None:
    response = client.post(INVOCATIONS, json=body)
    assert (response.status_code, text_of(response.json())) == (200, "same")


def test_streams_are_those_of_the_route(client: httpx.Client) -> None:
    response = client.post(INVOCATIONS, json=chat("streamed", stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert joined(sse_chunks(response.text)) == "streamed"
    events = named_events(client.post(INVOCATIONS, json={"model": "echo", "input": "s", "stream": True}).text)
    assert events[-1]["type"] == "response.completed"


def test_client_that_leaves_ends_the_request(client: httpx.Client, served: Served) -> None:
    with client.stream("POST", INVOCATIONS, json=chat("x" * 3000, stream=True)) as response:
        lines = response.iter_lines()  # kept: an iterator that is dropped closes the connection
        next(lines)
        assert not served.is_idle()
    eventually(served.is_idle)
    with pytest.raises(httpx.TimeoutException):
        client.post(INVOCATIONS, json=chat("x" * 3000), timeout=0.3)
    eventually(served.is_idle)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "none of messages, prompt and input"),
        ({**chat("a"), "prompt": "b"}, 400, "messages and prompt"),
        ({**chat("a"), "model": "other"}, 404, "other"),
        ({**chat("a"), "temperature": 9}, 400, "temperature"),
    ],
)
def test_mistakes_are_told_as_everywhere(client: httpx.Client, body: dict[str, Any], status: int, words: str) -> None:
    response = client.post(INVOCATIONS, json=body)
    assert (response.status_code, words in openai_error(response.json())["message"]) == (status, True)


def test_model_may_be_left_out_and_the_key_may_not(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "unnamed"}]}
    answer = httpx.post(served.url + INVOCATIONS, json=body, headers={"x-api-key": "key"}).json()
    assert (answer["model"], text_of(answer)) == ("echo", "unnamed")
    assert httpx.post(served.url + INVOCATIONS, json=body).status_code == 401
    plain = httpx.post(
        served.url + INVOCATIONS, content=b"{}", headers={"x-api-key": "key", "content-type": "text/csv"}
    )
    assert plain.status_code == 415
