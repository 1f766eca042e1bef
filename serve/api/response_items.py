"""The items that a response was asked with, as its listing shows them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from serve.api.errors import show
from serve.api.schemas.response_resource import ItemList
from serve.api.schemas.responses import (
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    MessageItem,
    Part,
    ReasoningItem,
    RefusalPart,
    TextPart,
)
from serve.errors import InvalidRequest

PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fc_", "reasoning": "rs_"}


def listed(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Each item with an id and a status, in the order in which they came."""
    return [
        {
            "id": getattr(item, "id", None) or f"{PREFIXES.get(item.type, 'item_')}{uuid.uuid4().hex}",
            "type": item.type,
            "status": "completed",
            **_fields(item),
        }
        for item in items
    ]


def _fields(item: Item) -> dict[str, Any]:
    match item:
        case MessageItem():
            kind = "output_text" if item.role == "assistant" else "input_text"
            return {"role": item.role, "content": _parts(item.content, kind)}
        case FunctionCallItem():
            return {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        case FunctionCallOutputItem():
            output = item.output if isinstance(item.output, str) else _parts(item.output, "input_text")
            return {"call_id": item.call_id, "output": output}
        case ReasoningItem():
            return {
                "summary": [{"type": "summary_text", "text": piece.text} for piece in item.summary],
                "content": [{"type": "reasoning_text", "text": piece.text} for piece in item.content or ()],
            }
        case _:
            raise RuntimeError(f"an item of type {item.type} was let in")


def _parts(content: str | Sequence[Part], kind: str) -> list[dict[str, Any]]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    if isinstance(content, str):
        return [{"type": kind, "text": content, **more}]
    return [
        {"type": "refusal", "refusal": part.refusal}
        if isinstance(part, RefusalPart)
        else {"type": kind, "text": part.text if isinstance(part, TextPart) else "", **more}
        for part in content
    ]


def page(items: Sequence[dict[str, Any]], after: str | None, limit: int, order: Literal["asc", "desc"]) -> ItemList:
    """At most ``limit`` items beyond ``after``.

    Raises:
        InvalidRequest: there is no item ``after``.
    """
    ordered = list(items) if order == "asc" else list(reversed(items))
    start = 0
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise InvalidRequest(f"after: this response has no item {show(after)}", param="after")
        start = ids.index(after) + 1
    data = ordered[start : start + limit]
    return ItemList(
        data=data,
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=start + limit < len(ordered),
    )
