"""A request of the Responses API to a chat completion's fields."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from serve.api.errors import show
from serve.api.fields import unread
from serve.api.schemas.responses import (
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    Item,
    MessageItem,
    OtherPart,
    Part,
    ReasoningItem,
    ResponsesRequest,
    TextFormat,
    TextPart,
    ToolChoice,
)
from serve.api.schemas.sampling import SamplingFields
from serve.api.translation import FieldNames
from serve.errors import InvalidRequest, UnsupportedParameter

NAMES = FieldNames(
    {
        r"messages.*": "input",
        r"max_completion_tokens": "max_output_tokens",
        r"tools\[(\d+)\]\.function\.(.*)": r"tools[\1].\2",
        r"tool_choice\.function\.name": "tool_choice.name",
        r"tool_choice\.allowed_tools\.(.*)": r"tool_choice.\1",
        r"reasoning_effort": "reasoning.effort",
        r"response_format\.json_schema\.(.*)": r"text.format.\1",
        r"response_format.*": "text.format",
        r"verbosity": "text.verbosity",
    }
)
"""What a chat completion's fields are called here."""

LOGPROBS = "message.output_text.logprobs"
INCLUDED = {LOGPROBS, "reasoning.encrypted_content"}
"""What ``include`` may name.  Thoughts are always included, and not encrypted."""


def chat_fields(body: ResponsesRequest, history: Sequence[Item]) -> dict[str, Any]:
    """The chat completion that answers ``body`` after the items of ``history``.

    Raises:
        InvalidRequest: nothing was said, or items do not belong where they are.
        UnsupportedParameter: what this server cannot read or do, by name.
    """
    if body.input is None and not history:
        raise InvalidRequest("input is missing; send it, or previous_response_id", param="input")
    for at, name in enumerate(body.include or ()):
        if name not in INCLUDED:
            raise UnsupportedParameter(f"include[{at}]: there is no {show(name)} here", param=f"include[{at}]")
    text = body.text
    wants_logprobs = bool(body.top_logprobs) or LOGPROBS in (body.include or ())
    return {
        **{name: getattr(body, name) for name in SamplingFields.model_fields},
        "model": body.model,
        "messages": [*_instructions(body), *to_messages(history, own_items(body))],
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": wants_logprobs or None,
        "top_logprobs": body.top_logprobs if wants_logprobs else None,
        "tools": [_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _choice(body.tool_choice) if isinstance(body.tool_choice, ToolChoice) else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(text.format) if text and text.format else None,
        "verbosity": text.verbosity if text else None,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "chat_template_kwargs": body.chat_template_kwargs,
    }


def own_items(body: ResponsesRequest) -> Sequence[Item]:
    """What the request itself says; a string is a message of the user's."""
    return [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input or []


def _instructions(body: ResponsesRequest) -> Iterable[dict[str, Any]]:
    return [{"role": "system", "content": body.instructions}] if body.instructions else []


def to_messages(history: Iterable[Item], items: Iterable[Item]) -> list[dict[str, Any]]:
    """Items as messages: what the assistant thought, said and called in a row is one message.

    Raises:
        InvalidRequest: an output without its call, or a part where it does not belong.
        UnsupportedParameter: an item or a part that cannot be read.
    """
    messages = _Messages()
    for item in history:
        messages.add(item, "input")
    for at, item in enumerate(items):
        messages.add(item, f"input[{at}]")
    return [message for message in messages.done if _says_something(message)]


def _says_something(message: dict[str, Any]) -> bool:
    """Whether it is more than reasoning that cannot be read; thoughts alone, as of a response cut off, get no text."""
    if message["role"] != "assistant" or message.keys() & {"content", "tool_calls"}:
        return True
    message["content"] = ""
    return bool(message.get("reasoning_content"))


class _Messages:
    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._call_ids: set[str] = set()

    def add(self, item: Item, where: str) -> None:
        match item:
            case MessageItem(role="assistant"):
                content = self._assistant().setdefault("content", [])
                content += _parts(item.content, f"{where}.content")
            case MessageItem():
                self.done.append({"role": item.role, "content": _parts(item.content, f"{where}.content")})
            case FunctionCallItem():
                self._call_ids.add(item.call_id)
                function = {"name": item.name, "arguments": item.arguments}
                calls = self._assistant().setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": function})
            case FunctionCallOutputItem():
                if item.call_id not in self._call_ids:
                    name = f"{where}.call_id"
                    raise InvalidRequest(f"{name}: no function_call has the call_id {show(item.call_id)}", param=name)
                content = _parts(item.output, f"{where}.output")
                self.done.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            case ReasoningItem():
                message = self._assistant()
                thoughts = "\n".join(piece.text for piece in item.content or item.summary)
                message["reasoning_content"] = "\n".join(filter(None, [message.get("reasoning_content"), thoughts]))
            case _:
                raise UnsupportedParameter(f"{where} is of type {item.type}, which is not supported here", param=where)

    def _assistant(self) -> dict[str, Any]:
        if not self.done or self.done[-1]["role"] != "assistant":
            self.done.append({"role": "assistant"})
        return self.done[-1]


def _parts(content: str | Sequence[Part], where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_part(part, f"{where}[{at}]") for at, part in enumerate(content)]


def _part(part: Part, where: str) -> dict[str, Any]:
    if isinstance(part, OtherPart):
        raise unread(part.type, where)
    return {"type": "text", "text": part.text if isinstance(part, TextPart) else part.refusal}


def _tool(tool: FunctionTool, where: str) -> dict[str, Any]:
    if tool.type != "function":
        name = f"{where}.type"
        raise UnsupportedParameter(f"{name}: there are functions only, no {show(tool.type)}", param=name)
    if tool.name is None:
        raise InvalidRequest(f"{where}.name is missing; it is required", param=f"{where}.name")
    given = {"description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    function = {"name": tool.name, **{name: value for name, value in given.items() if value is not None}}
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> dict[str, Any]:
    if choice.type == "function":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name is missing; type function needs it", param="tool_choice.name")
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type != "allowed_tools":
        name = "tool_choice.type"
        raise UnsupportedParameter(f"{name}: there are function and allowed_tools, no {show(choice.type)}", param=name)
    tools: list[dict[str, Any]] = []
    for at, tool in enumerate(choice.tools or ()):
        if tool.type != "function" or tool.name is None:
            name = f"tool_choice.tools[{at}]"
            raise UnsupportedParameter(f"{name}: functions are allowed by name only", param=name)
        tools.append({"type": "function", "function": {"name": tool.name}})
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode or "auto", "tools": tools}}


def _format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    given = {
        "name": wanted.name,
        "description": wanted.description,
        "schema": wanted.schema_,
        "strict": wanted.strict,
    }
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in given.items() if value is not None},
    }
