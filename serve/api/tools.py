"""A request's tools: which the model sees, which it may call, and whether it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.api.errors import show
from serve.api.schemas.tools import AllowedToolsChoice, NamedTool, Tool, ToolChoice
from serve.chat.calls import arguments_grammar, check_arguments
from serve.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What a request says about tools.

    ``shown`` goes into the prompt: the tools that may be called, by their place in the request.  ``demands`` says that
    a call must come, and nothing else.
    """

    shown: Mapping[int, Mapping[str, Any]]
    demands: bool = False
    is_single: bool = False

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """Those that may be called."""
        return list(self.shown.values())

    def arguments(self) -> dict[str, str]:
        """The grammar of each callable function's arguments, by name.

        Raises:
            InvalidRequest: a function's schema is wrong, or strict and not to be enforced.
        """
        return {
            tool["function"]["name"]: arguments_grammar(tool["function"], f"tools[{index}].function")
            for index, tool in self.shown.items()
        }


def tool_plan(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolPlan:
    """Read the fields ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Raises:
        InvalidRequest: two tools of one name, arguments that are no object, a choice without tools, or of a tool that
            is not there.
    """
    known = [tool.function.name for tool in tools or ()]
    for index, name in enumerate(known):
        if name in known[:index]:
            where = f"tools[{index}].function.name"
            raise InvalidRequest(f"{where}: there are two tools named {name!r}; rename one", param=where)
        check_arguments((tools or ())[index].function.parameters, f"tools[{index}].function.parameters")
    if not known:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools; send some, or leave it out", param="tool_choice")
        return ToolPlan({})
    if choice == "none":
        return ToolPlan({})
    names, demands = _chosen(choice, known)
    dumped = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    shown = {index: tool for index, tool in enumerate(dumped) if known[index] in names}
    return ToolPlan(shown, demands, is_single=isinstance(choice, NamedTool) or parallel is False)


def _chosen(choice: ToolChoice | None, known: Sequence[str]) -> tuple[Sequence[str], bool]:
    """The tools that may be called, and whether one must be."""
    if isinstance(choice, NamedTool):
        return [_known(choice.function.name, known, "tool_choice.function.name")], True
    if isinstance(choice, AllowedToolsChoice):
        where = "tool_choice.allowed_tools.tools"
        names = [
            _known(tool.function.name, known, f"{where}[{index}].function.name")
            for index, tool in enumerate(choice.allowed_tools.tools)
        ]
        return names, choice.allowed_tools.mode == "required"
    return known, choice == "required"


def _known(name: str, known: Sequence[str], param: str) -> str:
    if name not in known:
        raise InvalidRequest(f"{param}: there is no tool named {show(name)}; add it to tools", param=param)
    return name
