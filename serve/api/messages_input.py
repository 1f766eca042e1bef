"""A request in Anthropic's form to a chat completion's fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from serve.api.errors import show
from serve.api.fields import unread
from serve.api.schemas.messages import (
    Block,
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    OtherBlock,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from serve.api.translation import FieldNames
from serve.errors import InvalidRequest, UnsupportedParameter

_NAMES = {
    r"messages.*": "messages",
    r"max_completion_tokens": "max_tokens",
    r"tools\[(\d+)\]\.function\.parameters(.*)": r"tools[\1].input_schema\2",
    r"tools\[(\d+)\]\.function\.(.*)": r"tools[\1].\2",
    r"tool_choice\.function\.name": "tool_choice.name",
    r"parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    r"response_format\.json_schema\.schema(.*)": r"output_config.format.schema\1",
    r"response_format.*": "output_config.format",
    r"stop.*": "stop_sequences",
}
_OF_THINKING = FieldNames({**_NAMES, r"reasoning_effort": "thinking"})
_OF_EFFORT = FieldNames({**_NAMES, r"reasoning_effort": r"output_config.effort"})

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
LOW_BUDGET, MEDIUM_BUDGET = 4096, 16384
"""Thinking tokens below which the effort is low, and medium."""


def names(body: CountTokensRequest) -> FieldNames:
    """What a chat completion's fields are called in this request."""
    is_disabled = body.thinking is not None and body.thinking.type == "disabled"
    has_effort = body.output_config is not None and body.output_config.effort is not None
    return _OF_EFFORT if has_effort and not is_disabled else _OF_THINKING


def chat_fields(body: CountTokensRequest) -> dict[str, Any]:
    """The fields that make the prompt, and with a whole request those that make the answer.

    Raises:
        InvalidRequest: blocks that do not belong where they are.
        UnsupportedParameter: what this server cannot read or do, by name.
    """
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": [*_system(body.system), *_messages(body.messages)],
        "tools": [_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or ())] or None,
        "reasoning_effort": _effort(body),
        **_choice(body.tool_choice),
    }
    if body.output_config and body.output_config.format:
        schema = {"name": "output", "schema": body.output_config.format.schema_, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_completion_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stream": body.stream,
        }
    return fields


def _system(system: str | Sequence[TextBlock] | None) -> Iterator[dict[str, Any]]:
    if system:
        yield {"role": "system", "content": system if isinstance(system, str) else _parts(system)}


def _messages(messages: Sequence[InputMessage]) -> Iterator[dict[str, Any]]:
    if messages[-1].role == "assistant":
        where = f"messages[{len(messages) - 1}]"
        raise UnsupportedParameter(
            f"{where} is the assistant's: answers are never continued; end with a message of the user", param=where
        )
    call_ids: set[str] = set()
    for at, message in enumerate(messages):
        where = f"messages[{at}].content"
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            call_ids |= {block.id for block in message.content if isinstance(block, ToolUseBlock)}
            yield _from_assistant(message.content, where)
        else:
            yield from _from_user(message.role, message.content, where, call_ids)


def _from_user(role: str, blocks: Sequence[Block], where: str, call_ids: Set[str]) -> Iterator[dict[str, Any]]:
    texts: list[TextBlock] = []
    if not blocks:
        raise InvalidRequest(f"{where} is empty; add a block", param=where)
    for at, block in enumerate(blocks):
        place = f"{where}[{at}]"
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ToolResultBlock) and role == "user":
            if block.tool_use_id not in call_ids:
                name = f"{place}.tool_use_id"
                raise InvalidRequest(f"{name}: no tool_use has the id {show(block.tool_use_id)}", param=name)
            if texts:
                yield {"role": role, "content": _parts(texts)}
                texts = []
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block, place)}
        else:
            raise _refused(block, place, role)
    if texts:
        yield {"role": role, "content": _parts(texts)}


def _from_assistant(blocks: Iterable[Block], where: str) -> dict[str, Any]:
    texts: list[TextBlock] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for at, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif not isinstance(block, RedactedThinkingBlock):
            raise _refused(block, f"{where}[{at}]", "assistant")
    message: dict[str, Any] = {"role": "assistant", "content": _parts(texts) if texts or not calls else None}
    return (
        message
        | ({"tool_calls": calls} if calls else {})
        | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {})
    )


def _parts(blocks: Iterable[TextBlock]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": block.text} for block in blocks]


def _result(block: ToolResultBlock, where: str) -> str | list[dict[str, Any]]:
    if block.content is None or isinstance(block.content, str):
        return block.content or ""
    texts: list[TextBlock] = []
    for at, part in enumerate(block.content):
        if not isinstance(part, TextBlock):
            raise _refused(part, f"{where}.content[{at}]", "tool")
        texts.append(part)
    return _parts(texts)


def _refused(block: Block, where: str, role: str) -> InvalidRequest | UnsupportedParameter:
    if isinstance(block, OtherBlock):
        return unread(block.type, where)
    return InvalidRequest(f"{where} is of type {block.type}, which the role {role} cannot have", param=where)


def _tool(tool: Tool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        name = f"{where}.type"
        raise UnsupportedParameter(f"{name}: there is custom only, not {tool.type[:64]!r}", param=name)
    if tool.input_schema is None:
        name = f"{where}.input_schema"
        raise InvalidRequest(f"{name} is missing; it is required", param=name)
    given = {"description": tool.description, "strict": tool.strict}
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    return {
        "type": "function",
        "function": function | {name: value for name, value in given.items() if value is not None},
    }


def _choice(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name is missing; type tool needs it", param="tool_choice.name")
        wanted: Any = {"type": "function", "function": {"name": choice.name}}
    else:
        wanted = CHOICES[choice.type]
    return {"tool_choice": wanted, "parallel_tool_calls": False if choice.disable_parallel_tool_use else None}


def _effort(body: CountTokensRequest) -> str | None:
    thinking = body.thinking
    if thinking is not None and thinking.type == "disabled":
        return "none"
    if body.output_config is not None and body.output_config.effort is not None:
        return body.output_config.effort
    if thinking is None or thinking.type == "adaptive":
        return None
    if thinking.budget_tokens is None:
        raise InvalidRequest("thinking.budget_tokens is missing; type enabled needs it", param="thinking.budget_tokens")
    budget = thinking.budget_tokens
    return "low" if budget < LOW_BUDGET else "medium" if budget < MEDIUM_BUDGET else "high"
