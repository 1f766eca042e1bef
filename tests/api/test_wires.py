"""Tools, reasoning and structured output through the other wires: a scripted model, read by the official clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from anthropic import Anthropic
from anthropic.types import Message, RawMessageStreamEvent
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from support import Served, message_error, named_events, openai_error, scripted_engine, serving

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
CALLING = "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{{ messages | tojson }}"
THINKING = "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}" + CALLING
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
SCRIPTS = {
    "text": "Hello, 👋",
    "call": CALL,
    "text and calls": "One moment.\n" + CALL + "\n" + CALL.replace("Zürich", "Bern"),
    "thoughts and text": "<think>\nHm é.\n</think>\n\nHello",
    "thoughts and call": "<think>\nHm.\n</think>\n\n" + CALL,
    "nothing": "",
}
ITEMS = {
    "text": ["message"],
    "call": ["function_call"],
    "text and calls": ["message", "function_call", "function_call"],
    "thoughts and text": ["reasoning", "message"],
    "thoughts and call": ["reasoning", "function_call"],
    "nothing": [],
}
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
RESPONSE_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@contextmanager
def scripted(folder: Path, text: str | None, template: str = THINKING) -> Iterator[Served]:
    """A server whose model writes ``text``, whatever it is asked; None: what a grammar wants, else its prompt."""
    path = folder / "all.jinja"
    path.write_text(template, encoding="utf-8")
    engine = None if text is None else scripted_engine(list(text.encode()))
    with serving(engine, chat_template=path) as served:
        yield served


def message_request(**fields: Any) -> dict[str, Any]:
    tools = [{"name": "get_weather", "description": "Weather", "input_schema": SCHEMA}]
    messages = [{"role": "user", "content": "Weather?"}]
    return {"model": "echo", "max_tokens": 500, "messages": messages, "tools": tools, **fields}


def response_request(**fields: Any) -> dict[str, Any]:
    tools = [{"type": "function", "name": "get_weather", "description": "Weather", "parameters": SCHEMA}]
    return {"model": "echo", "input": "Weather?", "tools": tools, **fields}


def unnamed(value: Any) -> Any:
    """Without what is new in every answer."""
    if isinstance(value, dict):
        fresh = {"id", "call_id", "created_at", "completed_at"}
        return {name: unnamed(inner) for name, inner in value.items() if name not in fresh}
    return [unnamed(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", SCRIPTS)
def test_message_is_what_its_stream_adds_up_to(tmp_path: Path, name: str) -> None:
    kinds = {"message": "text", "function_call": "tool_use", "reasoning": "thinking"}
    with scripted(tmp_path, SCRIPTS[name]) as served:
        whole = httpx.post(served.url + MESSAGES, json=message_request()).json()
        events = named_events(httpx.post(served.url + MESSAGES, json=message_request(stream=True)).text)
        with (
            Anthropic(base_url=served.url, api_key="x", max_retries=0) as client,
            client.messages.stream(**message_request()) as stream,
        ):
            folded = stream.get_final_message().to_dict()

    TypeAdapter(Message).validate_python(whole, strict=True)
    for event in events:
        EVENTS.validate_python(event, strict=True)
    assert [block["type"] for block in whole["content"]] == [kinds[kind] for kind in ITEMS[name]]
    assert unnamed(folded) == unnamed(whole)
    assert whole["stop_reason"] == ("tool_use" if "call" in name else "end_turn")
    assert (whole["usage"]["output_tokens_details"]["thinking_tokens"] > 0) == ("thoughts" in name)
    for block in whole["content"]:
        if block["type"] == "tool_use":
            assert block["id"].startswith("toolu_")
            assert (block["name"], list(block["input"])) == ("get_weather", ["city"])
    indexes = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert indexes == list(range(len(ITEMS[name])))


@pytest.mark.parametrize("name", SCRIPTS)
def test_response_is_what_its_stream_adds_up_to(tmp_path: Path, name: str) -> None:
    with scripted(tmp_path, SCRIPTS[name]) as served:
        whole = httpx.post(served.url + RESPONSES, json=response_request()).json()
        events = named_events(httpx.post(served.url + RESPONSES, json=response_request(stream=True)).text)
        with (
            OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0) as client,
            client.responses.stream(**response_request()) as stream,
        ):
            folded = stream.get_final_response()

    TypeAdapter(Response).validate_python(whole, strict=True)
    for event in events:
        RESPONSE_EVENTS.validate_python(event, strict=True)
    assert [item["type"] for item in whole["output"]] == ITEMS[name]
    assert unnamed(events[-1]["response"]) == unnamed(whole)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert deltas(events) == [text(item) for item in whole["output"]]
    assert [text(item.to_dict()) for item in folded.output] == deltas(events)
    assert (whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0) == ("thoughts" in name)
    ended = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert ended == events[-1]["response"]["output"]


def text(item: dict[str, Any]) -> str:
    """What an item says: a call's arguments, or its text."""
    return item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]


def deltas(events: list[dict[str, Any]]) -> list[str]:
    """The text of each item as its deltas tell it, which must be what its end tells."""
    texts: list[str] = []
    for event in events:
        if event["type"] == "response.output_item.added":
            texts.append("")
        elif event["type"].endswith(".delta"):
            texts[event["output_index"]] += event["delta"]
        elif event["type"] == "response.function_call_arguments.done":
            assert event["arguments"] == texts[event["output_index"]]
        elif event["type"] in {"response.output_text.done", "response.reasoning_text.done"}:
            assert event["text"] == texts[event["output_index"]]
    return texts


def test_message_goes_on_after_a_call(tmp_path: Path) -> None:
    with (
        scripted(tmp_path, SCRIPTS["thoughts and call"]) as served,
        Anthropic(base_url=served.url, api_key="x", max_retries=0) as client,
    ):
        request = message_request()
        answer = client.messages.create(**request)
        call = answer.content[-1]
        assert call.type == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny", "is_error": False}
        request["messages"] += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        assert client.messages.create(**request).stop_reason == "tool_use"


@pytest.mark.parametrize("is_stored", [True, False])
def test_response_goes_on_after_a_call(tmp_path: Path, is_stored: bool) -> None:
    with (
        scripted(tmp_path, SCRIPTS["thoughts and call"]) as served,
        OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        request = response_request(store=is_stored)
        answer = client.responses.create(**request)
        call = answer.output[-1]
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        if is_stored:
            request |= {"previous_response_id": answer.id, "input": [result]}
        else:
            asked = {"role": "user", "content": "Weather?"}
            request["input"] = [asked, *(item.to_dict() for item in answer.output), result]
        assert client.responses.create(**request).output[-1].type == "function_call"


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "name": "get_weather"},
     {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}],
)  # fmt: skip
def test_response_calls_what_it_must(tmp_path: Path, choice: Any) -> None:
    with scripted(tmp_path, None) as served:
        response = httpx.post(served.url + RESPONSES, json=response_request(tool_choice=choice, max_output_tokens=900))

    body = response.json()
    assert [item["name"] for item in body["output"] if item["type"] == "function_call"] == ["get_weather"], body
    assert "city" in json.loads(body["output"][-1]["arguments"])
    assert body["tool_choice"] == choice
    TypeAdapter(Response).validate_python(body, strict=True)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_message_calls_what_it_must(tmp_path: Path, choice: dict[str, Any]) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    with scripted(tmp_path, None) as served:
        body = httpx.post(served.url + MESSAGES, json=message_request(tool_choice=choice)).json()

    assert [block["name"] for block in body["content"]] == ["get_weather"], body
    assert "city" in body["content"][0]["input"]
    assert body["stop_reason"] == "tool_use"


def test_tools_that_may_not_be_called_are_not_called(tmp_path: Path) -> None:
    with scripted(tmp_path, CALL) as served:
        message = httpx.post(served.url + MESSAGES, json=message_request(tool_choice={"type": "none"})).json()
        response = httpx.post(served.url + RESPONSES, json=response_request(tool_choice="none")).json()

    assert [block["type"] for block in message["content"]] == ["text"]
    assert [item["type"] for item in response["output"]] == ["message"]


def test_structured_output_fits_its_schema(tmp_path: Path) -> None:
    wanted = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    with scripted(tmp_path, None, CALLING) as served:
        response = httpx.post(served.url + RESPONSES, json=response_request(tools=[], text={"format": wanted})).json()
        plain = response_request(tools=[], text={"format": {"type": "json_object"}})
        objects = httpx.post(served.url + RESPONSES, json=plain).json()
        message = httpx.post(served.url + MESSAGES, json=message_request(tools=[], output_config=config)).json()

    assert set(json.loads(response["output"][0]["content"][0]["text"])) == {"city"}
    assert response["text"]["format"] == {**wanted, "description": None}
    assert isinstance(json.loads(objects["output"][0]["content"][0]["text"]), dict)
    assert set(json.loads(message["content"][0]["text"])) == {"city"}


def test_thinking_is_switched(tmp_path: Path) -> None:
    with scripted(tmp_path, None) as served:
        for fields, thinks in (
            ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, True),
            ({"thinking": {"type": "disabled"}}, False),
            ({"output_config": {"effort": "high"}}, True),
            ({}, False),
        ):
            count = httpx.post(served.url + MESSAGES, json=message_request(tools=[], **fields)).json()["usage"]
            without = httpx.post(served.url + MESSAGES, json=message_request(tools=[])).json()["usage"]
            assert (count["input_tokens"] - without["input_tokens"]) == (len("<think>") if thinks else 0)
        response = httpx.post(served.url + RESPONSES, json=response_request(tools=[], reasoning={"effort": "low"}))
        assert response.json()["reasoning"] == {"effort": "low", "summary": None}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "wat"}}], "tool_choice": "required"},
         "tools[0].parameters"),
        ({"tool_choice": {"type": "function", "name": "nothing"}}, "tool_choice.name"),
        ({"tools": [], "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "wat"}}}},
         "text.format.schema"),
        ({"tools": [], "text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"tools": [], "reasoning": {"effort": "wat"}}, "reasoning.effort"),
    ],
)  # fmt: skip
def test_response_names_its_own_fields(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    with scripted(tmp_path, None) as served:
        response = httpx.post(served.url + RESPONSES, json=response_request(**fields))

    assert response.status_code == 400, response.text
    error = openai_error(response.json())
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "f", "input_schema": {"type": "wat"}}], "tool_choice": {"type": "any"}},
         "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool", "name": "nothing"}}, "tool_choice.name"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "wat"}}}},
         "output_config.format.schema"),
    ],
)  # fmt: skip
def test_message_names_its_own_fields(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with scripted(tmp_path, None) as served:
        response = httpx.post(served.url + MESSAGES, json=message_request(**fields))

    assert response.status_code == 400, response.text
    assert words in message_error(response)["message"]
