"""Fields that a route does not have: refused where they would change the answer, else named, however deep they are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from support import chat, message_error, openai_error, serving

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USER = [{"role": "user", "content": "abc"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "echo", "messages": USER},
    TEXT: {"model": "echo", "prompt": "abc"},
    RESPONSES: {"model": "echo", "input": "abc"},
    MESSAGES: {"model": "echo", "messages": USER, "max_tokens": 50},
}


@pytest.mark.parametrize(
    ("path", "fields", "advice"),
    [
        (CHAT, {"input": "x"}, "messages"),
        (CHAT, {"max_output_tokens": 5}, "max_completion_tokens"),
        (CHAT, {"stop_sequences": ["a"]}, "stop"),
        (CHAT, {"system": "x"}, "system"),
        (CHAT, {"echo": True}, "leave it out"),
        (TEXT, {"response_format": {"type": "json_object"}}, "leave it out"),
        (TEXT, {"tools": [{}]}, "leave it out"),
        (TEXT, {"max_completion_tokens": 5}, "max_tokens"),
        (RESPONSES, {"max_tokens": 5}, "max_output_tokens"),
        (RESPONSES, {"response_format": {"type": "json_object"}}, "text.format"),
        (RESPONSES, {"reasoning_effort": "low"}, "reasoning.effort"),
        (MESSAGES, {"stop": "a"}, "stop_sequences"),
        (MESSAGES, {"seed": 1}, "leave it out"),
        (MESSAGES, {"n": 2}, "leave it out"),
    ],
)
def test_field_of_another_route_is_refused_with_what_it_is_called_here(
    client: httpx.Client, path: str, fields: dict[str, Any], advice: str
) -> None:
    response = client.post(path, json=BODIES[path] | fields)

    assert response.status_code == 400, response.text
    error = message_error(response) if path == MESSAGES else openai_error(response.json())
    if path != MESSAGES:
        assert (error["param"], error["code"]) == (next(iter(fields)), "unsupported_parameter")
    assert next(iter(fields)) in error["message"]
    assert advice in error["message"]


@pytest.mark.parametrize("path", BODIES)
def test_field_of_another_route_that_asks_for_nothing_is_accepted(client: httpx.Client, path: str) -> None:
    nothing = {"best_of": None, "echo": None, "functions": None, "stop_sequences": None, "seed": None, "suffix": None}
    neutral = {"response_format": {"type": "text"}, "n": 1, "presence_penalty": 0} if path != RESPONSES else {}
    response = client.post(path, json=BODIES[path] | nothing | neutral)

    assert response.status_code == 200, response.text
    assert "x-ignored-parameters" not in response.headers


def test_inner_fields_that_nobody_knows_are_named(client: httpx.Client) -> None:
    part = {"type": "text", "text": "abc", "cache_control": {"type": "ephemeral"}}
    named = {
        CHAT: ({"messages": [{"role": "user", "content": [part], "mood": 1, "x": None}]},
               "messages[0].content[0].cache_control, messages[0].mood"),
        RESPONSES: ({"input": [{"role": "user", "content": "abc", "mood": 1}], "stream": True,
                     "stream_options": {"x": 1}}, "input[0].mood, stream_options.x"),
        MESSAGES: ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}],
                    "tool_choice": {"type": "none"}}, "tools[0].defer_loading"),
    }  # fmt: skip
    for path, (fields, names) in named.items():
        response = client.post(path, json=BODIES[path] | fields)
        assert response.status_code == 200, response.text
        assert response.headers["x-ignored-parameters"] == names


def test_kinds_of_tools_that_openai_has_are_refused_as_unsupported(client: httpx.Client) -> None:
    function = {"type": "function", "function": {"name": "f"}}
    custom = {"type": "custom", "custom": {"name": "f", "input": "x"}}
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", **custom}]}
    for fields, param in (
        ({"tools": [custom]}, "tools[0].type"),
        ({"tools": [function], "tool_choice": custom}, "tool_choice.type"),
        ({"messages": [*USER, called]}, "messages[1].tool_calls[0].type"),
    ):
        error = openai_error(client.post(CHAT, json=BODIES[CHAT] | fields).json())
        assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    wrong = openai_error(client.post(CHAT, json=chat("a", tools=[{"type": "wat"}])).json())
    assert (wrong["code"], wrong["param"]) == (None, "tools[0].type")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        (CHAT, {"messages": [*USER, {"role": "assistant", "audio": {"id": "a"}}]}, "messages[1].audio"),
        (CHAT, {"metadata": {"a": "x" * 513}}, "metadata.a"),
        (RESPONSES, {"metadata": {"b" * 65: "x"}}, "metadata." + "b" * 65),
        (CHAT, {"metadata": {"c" * 5000: 1}}, "metadata." + "c" * 100),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters"),
        (RESPONSES, {"tools": [{"type": "function", "name": "f", "parameters": {"type": "string"}}]},
         "tools[0].parameters"),
    ],
)  # fmt: skip
def test_what_openai_refuses_is_refused_by_place(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    response = client.post(path, json=BODIES[path] | fields)

    assert response.status_code == 400
    assert openai_error(response.json())["param"] == param
    assert len(response.text) < 600


def test_response_goes_on_without_any_input(client: httpx.Client) -> None:
    first = client.post(RESPONSES, json=BODIES[RESPONSES]).json()
    more = client.post(RESPONSES, json={"model": "echo", "previous_response_id": first["id"]})

    assert more.json()["output"][0]["content"][0]["text"] == "abc"
    assert client.get(f"{RESPONSES}/{more.json()['id']}/input_items").json()["data"] == []
    assert openai_error(client.post(RESPONSES, json={"model": "echo"}).json())["param"] == "input"


def test_empty_lists_are_empty_texts_on_the_wires_that_have_them(client: httpx.Client) -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": []}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": ""}]}
    items = [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
             {"type": "function_call_output", "call_id": "c", "output": []}]  # fmt: skip
    for path, fields in (
        (MESSAGES, {"messages": [*USER, *turns, *USER]}),
        (MESSAGES, {"messages": [*USER, thought, *USER]}),
        (MESSAGES, {"messages": [*USER, {"role": "assistant", "content": []}, *USER]}),
        (RESPONSES, {"input": [*USER, *items, *USER]}),
    ):
        assert client.post(path, json=BODIES[path] | fields).status_code == 200


def test_other_wires_have_their_own_bounds_of_tools(client: httpx.Client) -> None:
    name = "mcp__" + "a" * 100
    tools = [{"name": f"{name}_{number}", "input_schema": {}} for number in range(200)]
    body = BODIES[MESSAGES] | {"tools": tools, "tool_choice": {"type": "none"}}
    assert client.post(MESSAGES, json=body).status_code == 200
    flat = [{"type": "function", "name": f"f{number}"} for number in range(200)]
    assert client.post(RESPONSES, json=BODIES[RESPONSES] | {"tools": flat, "tool_choice": "none"}).status_code == 200
    long = {"type": "function", "function": {"name": name}}
    assert openai_error(client.post(CHAT, json=chat("a", tools=[long])).json())["param"] == "tools[0].function.name"


def test_effort_that_cannot_be_is_refused_under_its_own_name(client: httpx.Client) -> None:
    for fields, name in (
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking"),
    ):
        assert message_error(client.post(MESSAGES, json=BODIES[MESSAGES] | fields))["message"].startswith(f"{name} '")


@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_compressed_body_is_refused_as_one(client: httpx.Client, encoding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    response = client.post(CHAT, content=gzip.compress(json.dumps(BODIES[CHAT]).encode()), headers=headers)

    assert response.status_code == 415
    assert encoding in openai_error(response.json())["message"]


def test_wrong_method_is_told_all_right_ones(client: httpx.Client) -> None:
    assert client.put(f"{RESPONSES}/resp_x", json={}).headers["allow"] == "DELETE, GET, HEAD"
    assert client.post("/v1/models", json={}).headers["allow"] == "GET, HEAD"
    assert client.delete("/docs/assets/x").status_code in {404, 405}


TEMPLATE = (
    "{% if enable_thinking is defined and enable_thinking %}<think>Well.</think>{% endif %}{{ messages[-1].content }}"
)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    template: Path = tmp_path_factory.mktemp("template") / "all.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    with (
        serving(strict=True, tool_prompt="generic", chat_template=template) as served,
        httpx.Client(base_url=served.url, timeout=30) as client,
    ):
        yield client


def answer(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}


@pytest.mark.parametrize("kind", ["text", "thought", "call"])
def test_strict_server_reads_its_own_answers_again(strict: httpx.Client, kind: str) -> None:
    def body(path: str, thought: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
        return BODIES[path] | {"text": {}, "thought": thought, "call": call}[kind]

    tool = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}
    message = answer(strict, CHAT, body(CHAT, {"reasoning_effort": "high"}, tool))["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in message.get("tool_calls", [])]
    answer(strict, CHAT, {"model": "echo", "messages": [*USER, message, *results, *USER]})

    tool = {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}
    output = answer(strict, RESPONSES, body(RESPONSES, {"reasoning": {"effort": "high"}}, tool))["output"]
    answer(strict, RESPONSES, {"model": "echo", "input": [*USER, *output, *USER]})

    tool = {"tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}], "tool_choice": {"type": "any"}}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 2000}}
    content = answer(strict, MESSAGES, body(MESSAGES, thinking, tool | {"max_tokens": 500}))["content"]
    answer(strict, MESSAGES, BODIES[MESSAGES] | {"messages": [*USER, {"role": "assistant", "content": content}, *USER]})


def test_tokenize_counts_tools_as_a_chat_completion_does(strict: httpx.Client) -> None:
    fields = {"messages": USER, "tools": [{"type": "function", "function": FUNCTION}]}
    count = answer(strict, "/tokenize", fields)["count"]
    assert count == answer(strict, CHAT, {"model": "echo", "max_tokens": 1, **fields})["usage"]["prompt_tokens"]
    assert strict.post("/tokenize", json={"prompt": "a", "tools": fields["tools"]}).status_code == 400
