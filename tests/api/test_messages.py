"""Anthropic's wire: every answer, every event, every error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import support
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from support import message_error, named_events, serving

from serve.errors import OutOfMemory

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def ask(text: str, **fields: Any) -> dict[str, Any]:
    """A request to the echo model."""
    return {"model": "echo", "max_tokens": 100, "messages": [{"role": "user", "content": text}], **fields}


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events add up to."""
    message: dict[str, Any] = events[0]["message"]
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                assert delta["type"] == "text_delta"
                block["text"] += delta["text"]
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
            case other:
                assert other in {"content_block_stop", "message_stop", "ping"}
    return message


def test_messages_answer_has_every_field(client: httpx.Client) -> None:
    response = client.post(MESSAGES, json=ask("héllo"))

    assert response.status_code == 200
    assert response.headers["request-id"] == response.headers["x-request-id"]
    body = response.json()
    TypeAdapter(Message).validate_python(body, strict=True)
    assert body["id"].startswith("msg_")
    assert body["content"] == [{"type": "text", "text": "héllo", "citations": None}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (6, 7)
    assert body["usage"]["cache_read_input_tokens"] == 0


def test_messages_stream_in_order(client: httpx.Client) -> None:
    response = client.post(MESSAGES, json=ask("ab", stream=True))

    assert response.headers["content-type"].startswith("text/event-stream")
    events = named_events(response.text)
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert [event["type"] for event in events] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["stop_reason"] is None
    assert events[0]["message"]["usage"]["input_tokens"] == 2


@settings(max_examples=25)
@given(
    text=st.text("ab, é👋\n", min_size=1, max_size=20),
    max_tokens=st.integers(1, 30),
    stop=st.lists(st.text("ab, ", min_size=1, max_size=3), max_size=3),
)
def test_messages_stream_folds_to_the_answer(echo: support.Served, text: str, max_tokens: int, stop: list[str]) -> None:
    body = ask(text, max_tokens=max_tokens, stop_sequences=stop)
    whole = httpx.post(echo.url + MESSAGES, json=body).json()
    events = named_events(httpx.post(echo.url + MESSAGES, json={**body, "stream": True}).text)

    assert events[-1] == {"type": "message_stop"}
    assert {**folded(events), "id": ""} == {**whole, "id": ""}


def test_messages_tell_which_sequence_stopped_them(client: httpx.Client) -> None:
    body = client.post(MESSAGES, json=ask("one, two; three", stop_sequences=["three", "; "])).json()

    assert body["content"][0]["text"] == "one, two"
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "; ")


def test_messages_end_at_max_tokens_and_at_the_context(client: httpx.Client) -> None:
    short = client.post(MESSAGES, json=ask("abcdef", max_tokens=3)).json()
    assert (short["content"][0]["text"], short["stop_reason"]) == ("abc", "max_tokens")

    with serving(max_model_len=16) as served:
        # As Anthropic has it: what is asked for may be more than fits.
        long = httpx.post(served.url + MESSAGES, json=ask("0123456789", max_tokens=32_000)).json()
        assert (long["content"][0]["text"], long["stop_reason"]) == ("012345", "model_context_window_exceeded")
        full = httpx.post(served.url + MESSAGES, json=ask("0123456789abcdef"))
        assert full.status_code == 400
        assert "shorten the messages" in message_error(full)["message"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that answers with the messages which the template was given."""
    template = tmp_path_factory.mktemp("template") / "all.jinja"
    template.write_text("{{ messages | tojson }}", encoding="utf-8")
    with serving(chat_template=template) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def seen(client: httpx.Client, **fields: Any) -> Any:
    """The messages that the template was given."""
    response = client.post(MESSAGES, json=ask("", **{"max_tokens": 4000, **fields}))
    assert response.status_code == 200, response.text
    count = client.post(COUNT, json={"model": "echo", "messages": [], **fields})
    assert count.json() == {"input_tokens": response.json()["usage"]["input_tokens"]}
    TypeAdapter(MessageTokensCount).validate_python(count.json(), strict=True)
    return json.loads(response.json()["content"][0]["text"])


def test_messages_read_system_and_blocks(written: httpx.Client) -> None:
    text = [{"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "B"}]
    messages = [
        {"role": "user", "content": text},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "T", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "C"},
            ],
        },
        {"role": "user", "content": "D"},
    ]

    assert seen(written, system=text, messages=messages) == [
        {"role": "system", "content": "A\nB"},
        {"role": "user", "content": "A\nB"},
        {"role": "assistant", "content": "C", "reasoning_content": "T"},
        {"role": "user", "content": "D"},
    ]
    assert seen(written, system="S", messages=messages[-1:])[0] == {"role": "system", "content": "S"}


def test_messages_read_calls_and_their_results(written: httpx.Client) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "get", "input": {"a": "é"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "R"}]}
    messages = [
        {"role": "user", "content": "W"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, {"type": "text", "text": "E"}]},
    ]

    _, assistant, tool, user = seen(written, messages=messages)

    function = assistant["tool_calls"][0]["function"]
    assert (assistant["tool_calls"][0]["id"], function["name"]) == ("toolu_1", "get")
    assert "é" in json.dumps(function["arguments"], ensure_ascii=False)
    assert tool == {"role": "tool", "content": "R", "tool_call_id": "toolu_1", "name": "get"}
    assert user == {"role": "user", "content": "E"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.7}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "document"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
         "tool_use"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
         "messages[0].content[0].tool_use_id"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content is empty"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"chat_template": "x"}, "chat_template"),
    ],
)  # fmt: skip
def test_messages_refuse_by_name(client: httpx.Client, fields: dict[str, Any], words: str) -> None:
    for path in (MESSAGES, COUNT):
        if path == COUNT and set(fields) & {"max_tokens", "temperature", "top_k", "stop_sequences"}:
            continue
        body = {name: value for name, value in ask("a", **fields).items() if path == MESSAGES or name != "max_tokens"}
        response = client.post(path, json=body)

        assert response.status_code == 400, response.text
        error = message_error(response)
        assert error["type"] == "invalid_request_error"
        assert words in error["message"]


def test_messages_name_what_they_ignore(client: httpx.Client) -> None:
    ignored = {"service_tier": "auto", "cache_control": {"type": "ephemeral"}, "context_management": {"edits": []}}
    body = ask("a", metadata={"user_id": "u"}, **ignored, foo=1)
    response = client.post(MESSAGES, json=body)

    assert response.status_code == 200
    assert response.headers["x-ignored-parameters"] == "foo"


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_messages_errors_are_anthropics(path: str) -> None:
    with serving(api_keys="sk-right", max_body_bytes=2048) as served, httpx.Client(base_url=served.url) as client:
        key = {"x-api-key": "sk-right"}
        body = {name: value for name, value in ask("a").items() if path == MESSAGES or name != "max_tokens"}
        bearer = {"authorization": "Bearer sk-right", "anthropic-version": "2023-06-01"}
        for headers in (key, bearer):
            assert client.post(path, json=body, headers=headers).status_code == 200
        asked = [
            (401, "authentication_error", client.post(path, json=body)),
            (401, "authentication_error", client.post(path, json=body, headers={"x-api-key": "wrong"})),
            (404, "not_found_error", client.post(path, json={**body, "model": "claude"}, headers=key)),
            (404, "not_found_error", client.post(path + "/x", json=body, headers=key)),
            (405, "invalid_request_error", client.get(path, headers=key)),
            (413, "request_too_large", client.post(path, json={**body, "system": "x" * 3000}, headers=key)),
            (415, "invalid_request_error", client.post(path, content="{}", headers=key)),
            (400, "invalid_request_error", client.post(path, content="{", headers={**key, **JSON})),
        ]
        for status, kind, response in asked:
            assert response.status_code == status
            assert message_error(response)["type"] == kind


JSON = {"content-type": "application/json"}


def test_messages_of_a_busy_or_a_failing_server() -> None:
    with support.loading(load_wait_s=0.01) as (served, _):
        response = httpx.post(served.url + MESSAGES, json=ask("a"))
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert message_error(response)["type"] == "overloaded_error"

    with serving(support.scripted_engine([*b"ab", OutOfMemory("no room")])) as served:
        response = httpx.post(served.url + MESSAGES, json=ask("a"))
        assert (response.status_code, message_error(response)["type"]) == (503, "overloaded_error")


def test_messages_stream_ends_with_its_error() -> None:
    with serving(support.scripted_engine([*b"ab", None])) as served:
        response = httpx.post(served.url + MESSAGES, json=ask("a", stream=True))

    events = named_events(response.text)
    assert [event["type"] for event in events][-1] == "error"
    assert "message_stop" not in response.text
    assert events[-1]["error"]["type"] == "api_error"
    assert events[-1]["request_id"] == response.headers["request-id"]


def test_messages_stream_pings_until_the_first_token() -> None:
    with (
        support.loading(keep_alive_s=0.02) as (served, gate),
        httpx.stream("POST", served.url + MESSAGES, json=ask("a", stream=True), timeout=20) as response,
    ):
        lines = response.iter_lines()
        begun = [next(lines) for _ in range(9)]
        gate.set()
        rest = "\n".join(lines)
    assert begun[0] == "event: message_start"
    assert begun.count("event: ping") >= 1
    assert json.loads(begun[4].removeprefix("data: ")) == {"type": "ping"}
    assert rest.rstrip().endswith('{"type":"message_stop"}')
