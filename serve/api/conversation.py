"""Messages of the wire to what a chat template reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from serve.api.schemas.chat import Message, TextPart
from serve.errors import InvalidRequest, UnsupportedParameter

PART_JOINER = "\n"
"""Between the text parts of one message."""


def to_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """What a chat template reads: role and text.

    Raises:
        InvalidRequest: a message without content.
        UnsupportedParameter: tools, or a part that is not text.
    """
    return [_to_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _to_message(message: Message, where: str) -> dict[str, Any]:
    if message.tool_calls or message.tool_call_id or message.role in {"tool", "function"}:
        name = "tool_calls" if message.tool_calls else "role"
        raise UnsupportedParameter(f"{where}: tools are not supported by this server yet", param=f"{where}.{name}")
    if message.content is None:
        raise InvalidRequest(f"{where}.content is missing; send a string", param=f"{where}.content")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _text(message.content, f"{where}.content")}


def _text(content: str | list[Any], where: str) -> str:
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if not isinstance(part, TextPart):
            raise UnsupportedParameter(
                f"{where}[{index}] is of type {part.type}; this model reads text only", param=f"{where}[{index}]"
            )
    return PART_JOINER.join(part.text for part in content)
