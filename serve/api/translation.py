"""Other wires on top of chat completions: their requests become a chat completion's, and its errors get their names.

So there is one path from a request to tokens, whatever wire it came on.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field

from serve.api.blocks import BlockReader
from serve.api.chat import start_chat
from serve.api.fields import check_neutral, validated
from serve.api.generation import Choices
from serve.api.schemas.chat import ChatCompletionRequest
from serve.api.schemas.tools import MAX_TURN_TOOLS, TurnTool
from serve.errors import ServeError
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord


class FieldNames:
    """How another wire calls the fields of a chat completion.

    Args:
        names: Regular expressions for a whole field of a chat completion, to its name elsewhere; the first match wins.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = [(re.compile(pattern), name) for pattern, name in names.items()]

    @contextmanager
    def applied(self) -> Generator[None]:
        """Errors that are raised inside name the other wire's fields."""
        try:
            yield
        except ServeError as error:
            name = self._renamed(error.param) if error.param else None
            if error.param and name:
                error.message, error.param = error.message.replace(error.param, name), name
            raise

    def _renamed(self, param: str) -> str | None:
        for pattern, name in self._names:
            if found := pattern.fullmatch(param):
                return found.expand(name)
        return None


class TurnRequest(ChatCompletionRequest):
    """A chat completion on another wire, whose bounds of tools are wider."""

    tools: Annotated[list[TurnTool], Field(max_length=MAX_TURN_TOOLS, fail_fast=True)] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


def to_chat(fields: Mapping[str, Any]) -> ChatCompletionRequest:
    """The chat completion with these fields; those that are None are left out.

    Raises:
        InvalidRequest: a value that a chat completion does not take.
        UnsupportedParameter: a field that is not implemented asks for something.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    # What a tool returned, or an assistant said beside its thoughts, may be a list of nothing there.
    given["messages"] = [{**each, "content": ""} if each.get("content") == [] else each for each in given["messages"]]
    body = validated(TurnRequest, given)
    check_neutral(body)
    return body


async def start_turn(
    body: ChatCompletionRequest, lifecycle: Lifecycle, record: RequestRecord, *, is_clamped: bool = False
) -> tuple[Choices, BlockReader]:
    """Queue the request and make the reader of its answer.

    Raises:
        ServeError: as :func:`~serve.api.chat.start_chat`.
    """
    choices, readers = await start_chat(body, lifecycle, record, is_clamped=is_clamped)
    return choices, BlockReader(readers[0])
