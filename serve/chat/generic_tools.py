"""Tools for models whose chat template knows none (``SERVE_TOOL_PROMPT=generic``): a prompt that explains them.

Calls and results become text in the form that most models have seen in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve.chat.template import Message

PROMPT = (
    "You can call functions. They are described here as JSON, one a line:\n{tools}\n\n"
    "To call one, answer with nothing but\n"
    '<tool_call>\n{{"name": "the function", "arguments": {{"its": "arguments"}}}}\n</tool_call>\n'
    "The result then comes as <tool_response>. Call a function only where it helps; answer in words otherwise."
)


def with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation in plain words, with the tools in its system message."""
    spoken = [_spoken(message) for message in messages]
    if not tools:
        return spoken
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = PROMPT.format(tools=described)
    if spoken and spoken[0]["role"] in {"system", "developer"}:
        first = spoken[0]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *spoken[1:]]
    return [{"role": "system", "content": text}, *spoken]


def _spoken(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [_call(call["function"]) for call in message["tool_calls"]]
    return {"role": "assistant", "content": "\n".join([*filter(None, [message.get("content")]), *calls])}


def _call(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"] or "{}"
    return f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}\n</tool_call>'
