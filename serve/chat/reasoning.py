"""How much a model is to think, in the words of its chat template."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from serve.chat.output.choose import OutputFormat
from serve.errors import UnsupportedParameter

SWITCHES = ("enable_thinking", "thinking", "think")
"""Variables that turn the reasoning on and off: Qwen and GLM, DeepSeek, others."""

_LEVELS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""Templates that have levels know these three."""

_HARDLY = frozenset({"none", "minimal"})
"""What a model that never reasons can do."""


def effort_variables(effort: str, variables: Set[str], output: OutputFormat) -> dict[str, Any]:
    """The template's variables for a ``reasoning_effort``.

    Args:
        effort: ``none``, or a level.
        variables: Those that the template reads.
        output: Whether the model reasons at all.

    Raises:
        UnsupportedParameter: the template cannot do it.  Where the model never reasons, ``none`` and ``minimal``
            need no switch.
    """
    found: dict[str, Any] = {name: effort != "none" for name in SWITCHES if name in variables}
    if "reasoning_effort" in variables and effort != "none":
        found["reasoning_effort"] = _LEVELS[effort]
    if found or (effort in _HARDLY and not output.thinks):
        return found
    what = "cannot be told not to reason" if effort == "none" else "has no switch for its reasoning"
    raise UnsupportedParameter(
        f"reasoning_effort {effort!r}: this model's chat template {what}; leave it out", param="reasoning_effort"
    )
