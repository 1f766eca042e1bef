"""Messages of the wire to what a chat template reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from serve.api.errors import show
from serve.api.fields import unread
from serve.api.schemas.chat import Message, OtherPart, Part, RefusalPart, ToolCall
from serve.errors import InvalidRequest, UnsupportedParameter

PART_JOINER = "\n"
"""Between the text parts of one message."""

MAX_VARIABLES, MAX_VARIABLE_CHARS = 16, 256
RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}  # have fields, or have not
    | {"bos_token", "eos_token", "unk_token", "pad_token", "raise_exception", "strftime_now"}  # the model's own
    | {"tokenize", "conversation", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs"}  # arguments of Transformers' function, and no variables
)
"""Names that ``chat_template_kwargs`` may not set."""


def to_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """What a chat template reads: role and text, an assistant's calls and reasoning, and which call a tool answers.

    Raises:
        InvalidRequest: a message without what its role needs.
        UnsupportedParameter: a part that is not text, or what OpenAI has deprecated.
    """
    names: dict[str, str] = {}
    return [_to_message(message, f"messages[{index}]", names) for index, message in enumerate(messages)]


def _to_message(message: Message, where: str, names: dict[str, str]) -> dict[str, Any]:
    if message.role == "function":
        raise UnsupportedParameter(f"{where}.role: function is deprecated; use tool", param=f"{where}.role")
    if message.audio is not None:
        raise unread("audio", f"{where}.audio")
    if message.role == "assistant":
        return _from_assistant(message, where, names)
    converted: dict[str, Any] = {"role": message.role, "content": _text(message, where)}
    if message.role == "tool":
        if message.tool_call_id is None:
            raise InvalidRequest(
                f"{where}.tool_call_id is missing; a tool message needs it", param=f"{where}.tool_call_id"
            )
        # Some templates name the tool; only its call did.
        name = message.name or names.get(message.tool_call_id)
        return {**converted, "tool_call_id": message.tool_call_id, **({"name": name} if name else {})}
    return {**converted, "name": message.name} if message.name else converted


def _from_assistant(message: Message, where: str, names: dict[str, str]) -> dict[str, Any]:
    if message.function_call is not None:
        name = f"{where}.function_call"
        raise UnsupportedParameter(f"{name} is deprecated; use tool_calls", param=name)
    calls = message.tool_calls or []
    content = message.refusal if message.content is None and message.refusal else None
    if message.content is not None or not (calls or content):
        content = _text(message, where)
    converted: dict[str, Any] = {"role": "assistant", "content": content}
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        converted["reasoning_content"] = reasoning
    if calls:
        names.update({call.id: call.function.name for call in calls})
        converted["tool_calls"] = [_to_call(call) for call in calls]
    return converted


def _to_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _text(message: Message, where: str) -> str:
    if message.content is None:
        raise InvalidRequest(f"{where}.content is missing; send a string", param=f"{where}.content")
    if isinstance(message.content, str):
        return message.content
    return PART_JOINER.join(_part_text(part, f"{where}.content[{at}]") for at, part in enumerate(message.content))


def _part_text(part: Part, where: str) -> str:
    if isinstance(part, OtherPart):
        raise unread(part.type, where)
    return part.refusal if isinstance(part, RefusalPart) else part.text


def template_variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The switches of the chat template that ``chat_template_kwargs`` sets, such as ``enable_thinking``.

    Raises:
        UnsupportedParameter: a template, or a variable that has a field of its own.
        InvalidRequest: too many, or one that is neither a short string nor a number, a boolean or null.
    """
    field = "chat_template_kwargs"
    if len(given or {}) > MAX_VARIABLES:
        raise InvalidRequest(
            f"{field} has {len(given or {})} entries; there may be at most {MAX_VARIABLES}", param=field
        )
    for name, value in (given or {}).items():
        where = f"{field}.{name[:64]}"
        if name.startswith("chat_template"):
            raise UnsupportedParameter(f"{where}: templates from requests are never run; leave it out", param=where)
        if name in RESERVED_VARIABLES or not name.isidentifier():
            raise UnsupportedParameter(f"{where} cannot be set by {field}; leave it out", param=where)
        is_short = isinstance(value, str) and len(value) <= MAX_VARIABLE_CHARS
        if not (is_short or value is None or isinstance(value, bool | int | float)):
            kinds = f"a string of at most {MAX_VARIABLE_CHARS} characters, a number, a boolean or null"
            raise InvalidRequest(f"{where}: the value must be {kinds}, not {show(value)}", param=where)
    return dict(given or {})
