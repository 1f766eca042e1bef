"""Stop strings and tool calls: a demanded call is always whole, one that the model makes by itself is whole or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from support import Served, json_schema, named_events, scripted_engine, serving, sse_chunks

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> Answer in <tool_call>.{% endif %}{{ messages[-1].content }}"
)
ARGUMENTS = '{"city": "Zürich"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
STOPS = ["rich", '"', "}", "\n", "ool_c"]
QUOTE = ord('"')


@contextmanager
def scripted(folder: Path, text: str) -> Iterator[Served]:
    path = folder / "hermes.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    with serving(scripted_engine(list(text.encode())), chat_template=path) as served:
        yield served


def body(path: str, choice: str, **fields: Any) -> dict[str, Any]:
    """A request with the tool in the route's own words; ``choice`` is auto, required or named."""
    function = {"name": "get_weather", "parameters": SCHEMA}
    message = {"role": "user", "content": "Weather?"}
    if path == MESSAGES:
        picked: Any = {"auto": {"type": "auto"}, "required": {"type": "any"}}
        picked = picked.get(choice, {"type": "tool", "name": "get_weather"})
        tool = {"name": "get_weather", "input_schema": SCHEMA}
        asked = {"messages": [message], "max_tokens": 200, "tools": [tool], "stop_sequences": STOPS[:4]}
        return {"model": "echo", **asked, "tool_choice": picked, **fields}
    named: Any = {"type": "function", "name": "get_weather"}
    tool, asked = {"type": "function", **function}, {"input": "Weather?"}
    if path == CHAT:
        named = {"type": "function", "function": {"name": "get_weather"}}
        tool, asked = {"type": "function", "function": function}, {"messages": [message]}
    picked = named if choice == "named" else choice
    more = {"stop": STOPS[:4], "stop_token_ids": [QUOTE], "tools": [tool], "tool_choice": picked}
    return {"model": "echo", **asked, **more, **fields}


def calls(path: str, served: Served, request: dict[str, Any]) -> tuple[str, Any]:
    """The joined arguments, and how the answer ended: the same plain and streamed."""
    plain = httpx.post(served.url + path, json=request, timeout=30).json()
    text = httpx.post(served.url + path, json={**request, "stream": True}, timeout=30).text
    if path == CHAT:
        [choice] = plain["choices"]
        said = [call["function"]["arguments"] for call in choice["message"].get("tool_calls") or ()]
        chunks = [chunk["choices"][0] for chunk in sse_chunks(text)]
        deltas = [call["function"]["arguments"] for chunk in chunks for call in chunk["delta"].get("tool_calls", ())]
        end = choice["finish_reason"], choice["message"]["content"]
        assert chunks[-1]["finish_reason"] == end[0]
        assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == (end[1] or "")
    elif path == RESPONSES:
        said = [item["arguments"] for item in plain["output"] if item["type"] == "function_call"]
        events = named_events(text)
        deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
        end = plain["status"]
        assert events[-1]["response"]["status"] == end
    else:
        blocks = [block["input"] for block in plain["content"] if block["type"] == "tool_use"]
        said = [ARGUMENTS] if blocks == [{"city": "Zürich"}] else []
        events = named_events(text)
        deltas = [event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta"]
        end = plain["stop_reason"], plain["stop_sequence"]
        assert (events[-2]["delta"]["stop_reason"], events[-2]["delta"]["stop_sequence"]) == end
    assert "".join(said) == "".join(deltas)
    return "".join(said), end


@pytest.mark.parametrize("choice", ["required", "named"])
@pytest.mark.parametrize(
    ("path", "end"), [(CHAT, ("tool_calls", None)), (RESPONSES, "completed"), (MESSAGES, ("tool_use", None))]
)
def test_demanded_call_is_whole_whatever_the_stop_strings(tmp_path: Path, path: str, end: Any, choice: str) -> None:
    with scripted(tmp_path, CALL) as served:
        assert calls(path, served, body(path, choice)) == (ARGUMENTS, end)


@pytest.mark.parametrize("stop", STOPS)
def test_call_of_its_own_accord_that_a_stop_string_cuts_is_no_call(tmp_path: Path, stop: str) -> None:
    with scripted(tmp_path, f"See:{CALL}") as served:
        request = body(CHAT, "auto", stop=stop, stop_token_ids=None)
        assert calls(CHAT, served, request) == ("", ("stop", "See:" if stop != "ool_c" else "See:<t"))


def test_text_after_a_whole_call_may_be_cut(tmp_path: Path) -> None:
    with scripted(tmp_path, f"{CALL}\nDone. END") as served:
        request = body(CHAT, "auto", stop="END", stop_token_ids=None)
        assert calls(CHAT, served, request)[0] == ARGUMENTS


def test_call_beside_constrained_text_that_a_stop_string_cuts_is_not_told_as_whole(tmp_path: Path) -> None:
    with scripted(tmp_path, CALL) as served:
        form = json_schema({"type": "integer"})
        request = body(CHAT, "auto", stop="rich", stop_token_ids=None, response_format=form)
        assert calls(CHAT, served, request)[1][0] == "stop"
        assert calls(CHAT, served, {**request, "stop": None}) == (ARGUMENTS, ("tool_calls", None))
