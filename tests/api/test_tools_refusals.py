"""Tools that are wrong, each refused by its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2 as httpx
from support import chat, openai_error, serving

TIME = {"type": "function", "function": {"name": "get_time"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


WRONG_TYPE = {"type": "object", "properties": {"a": {"type": "wat"}}}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no function": ({"tools": [{"type": "function"}]}, "tools[0].function"),
    "custom": ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    "name": ({"tools": [function(name="a b")]}, "tools[0].function.name"),
    "long name": ({"tools": [function(name="a" * 65)]}, "tools[0].function.name"),
    "parameters": ({"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
    "twice": ({"tools": [TIME, TIME]}, "tools[1].function.name"),
    "too many": ({"tools": [function(name=f"f{n}") for n in range(129)]}, "tools"),
    "choice": ({"tools": [TIME], "tool_choice": "maybe"}, "tool_choice"),
    "choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "named without tools": ({"tool_choice": NAMED}, "tool_choice"),
    "unknown": ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice.function.name"),
    "unknown allowed": (
        {
            "tools": [TIME],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
        },
        "tool_choice.allowed_tools.tools[0].function.name",
    ),
    "no object": (
        {"tools": [function(parameters={"type": "string"})], "tool_choice": "required"},
        "tools[0].function.parameters",
    ),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "function_call": ({"function_call": {"name": "f"}}, "function_call"),
    "bad schema": (
        {"tools": [TIME, function(parameters=WRONG_TYPE)], "tool_choice": "required"},
        "tools[1].function.parameters",
    ),
    "strict schema": (
        {"tools": [function(strict=True, parameters={"not": {}})], "tool_choice": "required"},
        "tools[0].function.parameters",
    ),
}


def test_wrong_tools_are_refused_by_place(tmp_path: Path) -> None:
    path = tmp_path / "tools.jinja"
    path.write_text("<tool_call>{{ tools | tojson }}{{ messages[-1].content }}", encoding="utf-8")
    with serving(chat_template=path) as served, httpx.Client(base_url=served.url) as client:
        for name, (fields, param) in BAD.items():
            response = client.post("/v1/chat/completions", json=chat("Weather?", **fields))
            assert response.status_code == 400, (name, response.text)
            error = openai_error(response.json())
            assert error["param"] is not None, (name, error)
            assert error["param"].startswith(param), (name, error)
