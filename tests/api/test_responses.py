"""The Responses API: every answer, every event, every error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import TypeAdapter
from support import named_events, openai_error, serving

RESPONSES = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ITEM: TypeAdapter[Any] = TypeAdapter(ResponseItem)


def ask(text: Any, **fields: Any) -> dict[str, Any]:
    """A request to the echo model."""
    return {"model": "echo", "input": text, **fields}


def without_names(response: dict[str, Any]) -> dict[str, Any]:
    """A response less what is new in every one."""
    items = [{**item, "id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": items}


def folded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that a stream's deltas add up to, each checked against its own end."""
    items: list[dict[str, Any]] = []
    for event in events:
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(items)
                assert (event["item"]["status"], event["item"]["content"]) == ("in_progress", [])
                items.append(event["item"])
            case "response.content_part.added":
                items[event["output_index"]]["content"].append(event["part"])
            case "response.output_text.delta":
                part = items[event["output_index"]]["content"][event["content_index"]]
                part["text"] += event["delta"]
                part["logprobs"] += event["logprobs"]
            case "response.output_text.done":
                assert event["text"] == items[event["output_index"]]["content"][event["content_index"]]["text"]
            case "response.content_part.done":
                assert event["part"] == items[event["output_index"]]["content"][event["content_index"]]
            case "response.output_item.done":
                item = items[event["output_index"]]
                item["status"] = event["item"]["status"]
                assert event["item"] == item
            case _:
                pass
    return items


def test_responses_answer_has_every_field(client: httpx.Client) -> None:
    body = client.post(RESPONSES, json=ask("héllo", metadata={"a": "b"}, instructions="be brief")).json()

    TypeAdapter(Response).validate_python(body, strict=True)
    assert body["id"].startswith("resp_")
    [message] = body["output"]
    assert message["content"] == [{"type": "output_text", "text": "héllo", "annotations": [], "logprobs": []}]
    assert (body["status"], body["error"], body["incomplete_details"]) == ("completed", None, None)
    assert (body["metadata"], body["instructions"]) == ({"a": "b"}, "be brief")
    assert body["usage"] == {
        "input_tokens": 6,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 13,
    }


def test_responses_stream_in_order(client: httpx.Client) -> None:
    response = client.post(RESPONSES, json=ask("ab", stream=True))

    assert response.headers["content-type"].startswith("text/event-stream")
    events = named_events(response.text)
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert events[0]["response"]["status"] == "in_progress"


@settings(max_examples=25)
@given(
    text=st.text("ab, é👋\n", min_size=1, max_size=20),
    max_tokens=st.integers(1, 30),
    stop=st.lists(st.text("ab, ", min_size=1, max_size=3), max_size=3),
)
def test_responses_stream_folds_to_the_answer(
    echo: support.Served, text: str, max_tokens: int, stop: list[str]
) -> None:
    body = ask(text, max_output_tokens=max_tokens, stop=stop)
    whole = httpx.post(echo.url + RESPONSES, json=body).json()
    events = named_events(httpx.post(echo.url + RESPONSES, json={**body, "stream": True}).text)

    last = events[-1]
    assert last["type"] == f"response.{whole['status']}"
    assert without_names(last["response"]) == without_names(whole)
    assert folded(events) == last["response"]["output"]
    assert whole["status"] == ("incomplete" if whole["incomplete_details"] else "completed")


def test_responses_tell_what_cut_them(client: httpx.Client) -> None:
    body = client.post(RESPONSES, json=ask("abcdef", max_output_tokens=3)).json()

    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    assert body["completed_at"] is None


def test_responses_tell_log_probabilities_when_asked(echo: support.Served) -> None:
    included = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    plain = httpx.post(echo.url + RESPONSES, json=ask("ab")).json()

    assert plain["output"][0]["content"][0]["logprobs"] == []
    body = httpx.post(echo.url + RESPONSES, json=ask("ab", **included)).json()
    assert body["top_logprobs"] == 2


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that answers with the messages which the template was given."""
    template = tmp_path_factory.mktemp("template") / "all.jinja"
    template.write_text("{{ messages | tojson }}", encoding="utf-8")
    with serving(chat_template=template) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def seen(client: httpx.Client, text: Any, **fields: Any) -> Any:
    """The messages that the template was given."""
    response = client.post(RESPONSES, json=ask(text, **fields))
    assert response.status_code == 200, response.text
    count = client.post(RESPONSES + "/input_tokens", json=ask(text, **fields)).json()
    assert count == {"object": "response.input_tokens", "input_tokens": response.json()["usage"]["input_tokens"]}
    return json.loads(response.json()["output"][0]["content"][0]["text"])


def test_responses_go_on_after_reasoning_alone(written: httpx.Client) -> None:
    """As of a response that max_output_tokens cut off while the model was thinking, or of another server."""
    user = {"role": "user", "content": "A"}
    read = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]}
    unread = {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"}

    assert seen(written, [user, read, user])[1] == {"role": "assistant", "content": "", "reasoning_content": "T"}
    assert [message["role"] for message in seen(written, [user, unread, user])] == ["user", "user"]
    text = {"type": "message", "role": "assistant", "content": "C"}
    assert seen(written, [user, unread, text, user])[1]["content"] == "C"


def test_responses_read_items(written: httpx.Client) -> None:
    text = {"type": "output_text", "text": "C", "annotations": []}
    items = [
        {"type": "message", "role": "developer", "content": "A"},
        {"role": "user", "content": [{"type": "input_text", "text": "B"}, {"type": "input_text", "text": "B"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]},
        {"type": "message", "role": "assistant", "content": [text], "id": "m", "status": "completed", "phase": "x"},
        {"type": "function_call", "call_id": "call_1", "name": "get", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "R"},
        {"role": "user", "content": "D"},
    ]

    system, developer, user, assistant, tool, last = seen(written, items, instructions="I")

    assert system == {"role": "system", "content": "I"}
    assert developer == {"role": "system", "content": "A"}
    assert user == {"role": "user", "content": "B\nB"}
    assert (assistant["content"], assistant["reasoning_content"]) == ("C", "T")
    assert assistant["tool_calls"][0]["function"]["name"] == "get"
    assert tool == {"role": "tool", "content": "R", "tool_call_id": "call_1", "name": "get"}
    assert last == {"role": "user", "content": "D"}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": []}, "input", None),
        ({"input": None}, "input", None),
        ({"input": [{"role": "user", "content": [{"text": "a"}]}]}, "input[0].content[0].type", None),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role", None),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "unsupported"),
        ({"input": [{"type": "web_search_call", "id": "a"}]}, "input[0]", "unsupported"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]", "unsupported"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input[0].call_id", None),
        ({"max_output_tokens": 0}, "max_output_tokens", None),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "context_length_exceeded"),
        ({"input": "x" * 9000}, "input", "context_length_exceeded"),
        ({"temperature": 3}, "temperature", None),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", None),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", None),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type", "unsupported"),
        ({"include": ["file_search_call.results"]}, "include[0]", "unsupported"),
        ({"conversation": "c"}, "conversation", "unsupported"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported"),
        ({"truncation": "auto"}, "truncation", "unsupported"),
        ({"n": 2}, "n", "unsupported"),
        ({"background": True, "stream": True}, "background", "unsupported"),
        ({"background": True, "store": False}, "background", None),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "previous_response_not_found"),
        ({"chat_template": "x"}, "chat_template", "unsupported"),
        ({"metadata": {str(at): "" for at in range(17)}}, "metadata", None),
    ],
)
def test_responses_refuse_by_name(client: httpx.Client, fields: dict[str, Any], param: str, code: str | None) -> None:
    response = client.post(RESPONSES, json=ask("a", **fields))

    assert response.status_code == 400, response.text
    error = openai_error(response.json())
    assert (error["param"], error["code"]) == (param, "unsupported_parameter" if code == "unsupported" else code)
    assert param in error["message"]


def test_responses_name_what_they_ignore(client: httpx.Client) -> None:
    fields = {"service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k", "foo": 1}
    response = client.post(RESPONSES, json=ask("a", **fields, max_tool_calls=3, truncation="disabled"))

    assert response.status_code == 200
    assert response.headers["x-ignored-parameters"] == "foo"
    assert (response.json()["safety_identifier"], response.json()["max_tool_calls"]) == ("s", 3)


def test_responses_stream_ends_with_its_error() -> None:
    with serving(support.scripted_engine([*b"ab", None])) as served, httpx.Client(base_url=served.url) as client:
        events = named_events(client.post(RESPONSES, json=ask("a", stream=True)).text)

        for event in events:
            EVENT.validate_python(event, strict=True)
        failed, error = events[-2:]
        assert failed["type"] == "response.failed"
        assert failed["response"]["status"] == "failed"
        assert failed["response"]["error"]["code"] == "server_error"
        assert failed["response"]["output"][0]["status"] == "incomplete"
        assert error["type"] == "error"
        assert (error["code"], error["error"]["code"]) == ("generation_failed", "generation_failed")
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        kept = client.get(f"{RESPONSES}/{failed['response']['id']}").json()
        assert kept == failed["response"]
        whole = client.post(RESPONSES, json=ask("a"))
        assert (whole.status_code, openai_error(whole.json())["code"]) == (500, "generation_failed")


def test_responses_do_not_offer_compaction(client: httpx.Client) -> None:
    assert client.post(RESPONSES + "/compact", json=ask("a")).status_code == 404
