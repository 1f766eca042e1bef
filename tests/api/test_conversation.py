"""What the model's template reads of a request: an echo server whose template writes down all it was given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from support import openai_error, serving

PATH = "/v1/chat/completions"
TEMPLATE = (
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ {'messages': messages, 'enable_thinking': enable_thinking | default('unset')} | tojson }}"
)
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    template: Path = tmp_path_factory.mktemp("template") / "all.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    with serving(chat_template=template) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def seen(client: httpx.Client, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What the template was given."""
    response = client.post(PATH, json={"model": "echo", "messages": messages, **fields})
    assert response.status_code == 200, response.text
    return json.loads(response.json()["choices"][0]["message"]["content"])


def refused(client: httpx.Client, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"model": "echo", "messages": messages, **fields})
    assert response.status_code == 400, response.text
    return openai_error(response.json())


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_text_parts_are_joined_in_every_role(client: httpx.Client, role: str) -> None:
    """Case 19."""
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    message = {"role": role, "content": parts, **({"tool_call_id": "x"} if role == "tool" else {})}
    [read] = seen(client, message)["messages"]
    assert read["content"] == "A\nB"
    assert read["role"] == {"developer": "system"}.get(role, role)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_part_that_is_no_text_is_refused_by_place(client: httpx.Client, role: str, kind: str) -> None:
    """Case 20."""
    message = {"role": role, "content": [{"type": "text", "text": "A"}, {"type": kind, kind: {}}], "tool_call_id": "x"}
    error = refused(client, {"role": "user", "content": "a"}, message)
    assert (error["param"], error["code"]) == ("messages[1].content[1]", "unsupported_parameter")
    assert kind in error["message"]


def test_history_of_calls_reaches_the_template(client: httpx.Client) -> None:
    """Case 18."""
    history = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "easy"},
    ]
    _, called, answered, spoken = seen(client, *history)["messages"]
    assert called["tool_calls"][0]["id"] == "call_1"
    assert called["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert answered == {"role": "tool", "content": "2", "tool_call_id": "call_1", "name": "add"}
    assert spoken == {"role": "assistant", "content": "two", "reasoning_content": "easy"}


def test_refusals_of_an_assistant_are_its_words(client: httpx.Client) -> None:
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    field = {"role": "assistant", "content": None, "refusal": "never"}
    assert [message["content"] for message in seen(client, part, field)["messages"]] == ["no", "never"]


BAD_MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "tool without id": ({"role": "tool", "content": "2"}, "tool_call_id"),
    "tool without content": ({"role": "tool", "tool_call_id": "x"}, "content"),
    "assistant without anything": ({"role": "assistant"}, "content"),
    "function role": ({"role": "function", "name": "f", "content": "2"}, "role"),
    "function_call": ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "function_call"),
    "calls an object": ({"role": "assistant", "tool_calls": {}}, "tool_calls"),
    "call without id": ({"role": "assistant", "tool_calls": [{**CALL, "id": None}]}, "tool_calls[0].id"),
    "call of another type": ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls[0].type"),
    "arguments an object": (
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]},
        "tool_calls[0].function.arguments",
    ),
    "call without a name": (
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"arguments": "{}"}}]},
        "tool_calls[0].function.name",
    ),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_message_without_what_its_role_needs_is_refused_by_place(client: httpx.Client, name: str) -> None:
    message, place = BAD_MESSAGES[name]
    assert refused(client, message)["param"] == f"messages[0].{place}"


def test_template_refusal_reaches_the_caller_in_its_words(client: httpx.Client) -> None:
    """Case 22."""
    error = refused(client, {"role": "user", "content": "refuse"})
    assert "roles must alternate" in error["message"]
    assert error["param"] == "messages"


USER = {"role": "user", "content": "a"}


def test_switches_reach_the_template(client: httpx.Client) -> None:
    assert seen(client, USER, chat_template_kwargs={"enable_thinking": False})["enable_thinking"] is False
    for nothing in ({}, None):
        assert seen(client, USER, chat_template_kwargs=nothing)["enable_thinking"] == "unset"


HOSTILE = "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}x"


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"chat_template": HOSTILE}, "chat_template_kwargs.chat_template"),
        ({"chat_template": None}, "chat_template_kwargs.chat_template"),
        ({"messages": "x"}, "chat_template_kwargs.messages"),
        ({"tools": "x"}, "chat_template_kwargs.tools"),
        ({"add_generation_prompt": False}, "chat_template_kwargs.add_generation_prompt"),
        ({"bos_token": "<|im_start|>"}, "chat_template_kwargs.bos_token"),
        ({"tokenize": True}, "chat_template_kwargs.tokenize"),
        ({"a b": 1}, "chat_template_kwargs.a b"),
        ({"deep": {"a": 1}}, "chat_template_kwargs.deep"),
        ({"long": "x" * 257}, "chat_template_kwargs.long"),
        ({f"v{number}": 1 for number in range(17)}, "chat_template_kwargs"),
        ("x", "chat_template_kwargs"),
    ],
)
def test_switches_are_never_a_template_and_always_small(client: httpx.Client, kwargs: Any, param: str) -> None:
    """Case 24."""
    assert refused(client, USER, chat_template_kwargs=kwargs)["param"] == param


def test_template_of_a_request_is_refused(client: httpx.Client) -> None:
    """Case 24."""
    assert refused(client, USER, chat_template=HOSTILE)["code"] == "unsupported_parameter"
