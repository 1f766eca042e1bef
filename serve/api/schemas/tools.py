"""The wire of tools: what may be called, and whether it must be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from serve.api.schemas.structured import NAME_PATTERN
from serve.api.schemas.wire import Wire

MAX_TOOLS = 128


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
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(Wire):
    """Only some tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolList = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = (
    Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]
)
