"""The wire of tools: what may be called, and whether it must be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from serve.api.schemas.structured import NAME_PATTERN
from serve.api.schemas.wire import Wire

MAX_TOOLS, MAX_TURN_TOOLS = 128, 256
"""Of a chat completion, and on the wires that become one."""

TOOL_NAME_PATTERN = "^[A-Za-z0-9_-]{1,128}$"
"""On the wires that become a chat completion: Anthropic allows twice OpenAI's length."""


class FunctionDefinition(Wire):
    """A function; ``parameters`` is a JSON schema of its arguments, left out where it has none."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Refuse schemas that cannot be enforced, where a call is demanded.")


class Tool(Wire):
    """A tool."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Wire):
    """Which function."""

    name: str


class NamedTool(Wire):
    """A function, by name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Wire):
    """Some of the request's tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TURN_TOOLS)]


class AllowedToolsChoice(Wire):
    """Only some tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class TurnFunction(FunctionDefinition):
    """A function of another wire."""

    name: Annotated[str, Field(pattern=TOOL_NAME_PATTERN)]


class TurnTool(Tool):
    """A tool of another wire."""

    function: TurnFunction  # pyright: ignore[reportIncompatibleVariableOverride]


ToolList = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = (
    Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]
)
