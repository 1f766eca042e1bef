"""Every route through a queue: the same answers as over HTTP, streamed and not, and with the official clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2 as httpx
import openai
import pytest
from runpod_local import LocalRunpod
from support import chat, serving

TEXT = "héllo 🎉🏽 \u2028 wörld"

CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "get_weather", "parameters": SCHEMA}
MESSAGE = {"model": "echo", "max_tokens": 900, "messages": [{"role": "user", "content": TEXT}]}
CALLED = [{"role": "user", "content": CALL}]
FOR_ANTHROPIC = {"tools": [{"name": "get_weather", "input_schema": SCHEMA}], "messages": CALLED}

REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/echo", None),
    ("GET", "/v1/models/other", None),
    ("GET", "/health", None),
    ("GET", "/version", None),
    ("GET", "/nowhere", None),
    ("GET", "/v1/responses/resp_none", None),
    ("PUT", "/v1/chat/completions", {}),
    ("POST", "/v1/chat/completions", {}),
    ("POST", "/v1/chat/completions", chat("hi", model="other")),
    ("POST", "/v1/chat/completions", chat("hi", temperature="5")),
    ("POST", "/v1/chat/completions", chat("hi", max_tokens=10**6)),
    ("POST", "/v1/chat/completions", chat("hi", audio={"voice": "x"})),
    ("POST", "/v1/chat/completions?x=ü", chat("hi")),
    ("POST", "/v1/embeddings", {"model": "echo", "input": "hi"}),
    ("POST", "/v1/messages/count_tokens", {"model": "echo", "messages": MESSAGE["messages"]}),
    ("POST", "/tokenize", {"model": "echo", "prompt": TEXT}),
    ("POST", "/detokenize", {"model": "echo", "tokens": [104, 105]}),
]
STREAMABLE: list[tuple[str, Any]] = [
    ("/v1/chat/completions", chat(TEXT, max_tokens=2)),
    ("/v1/chat/completions", chat(TEXT, stop="w", n=2, logprobs=True, temperature=1, seed=3)),
    ("/v1/chat/completions", chat(CALL, tools=[{"type": "function", "function": TOOL}])),
    ("/v1/chat/completions", chat("[1]", response_format={"type": "json_object"})),
    ("/v1/chat/completions", chat("hi", temperature=9)),
    ("/v1/completions", {"model": "echo", "prompt": [TEXT, "second"], "max_tokens": 900, "logprobs": 1}),
    ("/v1/responses", {"model": "echo", "input": TEXT}),
    ("/v1/responses", {"model": "echo", "input": CALL, "tools": [{"type": "function", **TOOL}]}),
    ("/v1/responses", {"model": "echo", "input": "hi", "max_output_tokens": 0}),
    ("/v1/messages", MESSAGE),
    ("/v1/messages", {**MESSAGE, **FOR_ANTHROPIC}),
    ("/v1/messages", {**MESSAGE, "max_tokens": 0}),
]
SAME_WORKER: dict[str, Any] = {"tool_prompt": "generic", "tool_parser": "hermes"}
"""As the worker of these tests is set: the echo engine repeats a tool call, and the parser reads it."""

CHANGING = {
    "id",
    "item_id",
    "created",
    "created_at",
    "completed_at",
    "request_id",
    "call_id",
    "phases",
    "uptime_s",
    "version",
}


def steady(value: Any) -> Any:
    """An answer without what differs from call to call."""
    if isinstance(value, dict):
        return {name: steady(part) for name, part in value.items() if name not in CHANGING}
    return [steady(part) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """The same server over HTTP."""
    with serving(max_batch_size=4, **SAME_WORKER) as served, httpx.Client(base_url=served.url) as client:
        yield client


def assert_same(direct: httpx.Response, job: Any, place: object) -> None:
    if direct.status_code < 400:
        assert job["status"] == "COMPLETED", (place, job)
        assert steady(job["output"]) == [steady(direct.json())], place
    else:
        assert job["status"] == "FAILED", (place, job)
        error = json.loads(job["error"])
        assert error.pop("status") == direct.status_code, place
        assert steady(error) == steady(direct.json()), place


def test_the_queue_answers_as_http_does(runpod: LocalRunpod, http: httpx.Client):
    requests = [*REQUESTS, *(("POST", route, body) for route, body in STREAMABLE)]
    for method, route, body in requests:
        direct = http.request(method, route, json=body) if body is not None else http.request(method, route)
        assert_same(direct, runpod.runsync({"route": route, "method": method, "body": body}), (route, body))


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of an answer with its place; choices and tool calls have their index in it."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in CHANGING | {"sequence_number", "logprobs"}:
                yield from leaves(part, f"{place}.{name}")
    elif isinstance(value, list):
        for at, part in enumerate(value):
            yield from leaves(part, f"{place}[{part.get('index', at) if isinstance(part, dict) else at}]")
    else:
        yield place, value


def folded(text: str) -> dict[str, Any]:
    """What a stream adds up to, however many tokens its events have: each place with its value or joined text."""
    found: dict[str, list[Any]] = {}
    for block in text.split("\n\n"):
        name, _, data = block.rpartition("data: ")
        if data and not block.startswith(":"):
            body = json.loads(data) if data != "[DONE]" else data
            kind = body.get("type", "") if isinstance(body, dict) else ""
            for place, value in leaves(body, f"{name.strip()} {kind}"):
                found.setdefault(place, []).append(value)
    return {
        place: "".join(values)
        if all(isinstance(value, str) for value in values) and len(set(values)) > 1
        else values[-1]
        for place, values in found.items()
    }


def test_the_queue_streams_as_http_does(runpod: LocalRunpod, http: httpx.Client):
    for route, body in STREAMABLE:
        asked = {**body, "stream": True}
        direct = http.post(route, json=asked)
        job = runpod.run({"openai_route": route, "openai_input": asked})
        pieces, last = runpod.stream(job)
        got = folded("".join(pieces))
        if direct.status_code < 400:
            assert last["status"] == "COMPLETED", (route, body)
            assert got == folded(direct.text), (route, body)
        else:  # there is no status on a stream, so its clients get the error as its last event
            assert_same(direct, runpod.status(job), (route, body))
            named = "event: error\ndata: " if route == "/v1/messages" else "data: "
            assert pieces[0].startswith(named), (route, body)
            assert got.items() >= folded(f"{named}{direct.text}").items(), (route, body)


def test_a_stored_response_is_read_and_deleted_through_the_queue(runpod: LocalRunpod):
    body = {"model": "echo", "input": "hi", "store": True}
    made = runpod.runsync({"openai_route": "/v1/responses", "openai_input": body})["output"][0]
    place = f"/v1/responses/{made['id']}"
    assert runpod.runsync({"openai_route": place})["output"] == [made]
    follow = {"model": "echo", "input": "again", "previous_response_id": made["id"]}
    again = runpod.runsync({"openai_route": "/v1/responses", "openai_input": follow})["output"][0]
    assert again["output"][0]["content"][0]["text"] == "again"
    assert runpod.runsync({"route": place, "method": "DELETE"})["output"][0]["deleted"] is True
    assert json.loads(runpod.runsync({"openai_route": place})["error"])["status"] == 404


def test_anthropics_client_works_unmodified(runpod: LocalRunpod):
    client = anthropic.Anthropic(base_url=f"{runpod.base}/openai", auth_token=runpod.plane.key, max_retries=0)
    asked: Any = {"model": "echo", "max_tokens": 900, "messages": [{"role": "user", "content": TEXT}]}
    assert client.messages.create(**asked).content[0].text == TEXT  # pyright: ignore[reportAttributeAccessIssue]
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == TEXT
    with client.messages.stream(**{**asked, **FOR_ANTHROPIC}) as stream:  # pyright: ignore[reportArgumentType]
        assert stream.get_final_message().content[0].input == {"city": "Zürich"}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(anthropic.NotFoundError, match="other"):
        client.messages.create(**{**asked, "model": "other"})
    with (
        pytest.raises(anthropic.APIStatusError, match="other"),
        client.messages.stream(**{**asked, "model": "other"}) as stream,
    ):
        stream.get_final_message()


def test_the_openai_client_works_unmodified(runpod: LocalRunpod):
    client = openai.OpenAI(base_url=f"{runpod.base}/openai/v1", api_key=runpod.plane.key, max_retries=0)
    assert [model.id for model in client.models.list()] == ["echo"]
    message: Any = {"role": "user", "content": TEXT}
    answer = client.chat.completions.create(model="echo", messages=[message])
    assert answer.choices[0].message.content == TEXT
    chunks = client.chat.completions.create(model="echo", messages=[message], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    tools: Any = [{"type": "function", "function": TOOL}]
    asked: Any = {"model": "echo", "messages": CALLED, "tools": tools}
    with client.chat.completions.stream(**asked) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Zürich"}
    assert client.responses.create(model="echo", input=TEXT).output_text == TEXT
    with client.responses.stream(model="echo", input=TEXT) as stream:
        assert stream.get_final_response().output_text == TEXT
    assert client.completions.create(model="echo", prompt=TEXT, max_tokens=900).choices[0].text == TEXT
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=[message])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="echo", messages=[message], temperature=9)
    chunks = client.chat.completions.create(model="echo", messages=[message], temperature=9, stream=True)
    with pytest.raises(openai.APIError, match="temperature"):
        list(chunks)
