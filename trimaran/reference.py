"""Reference pages made from the code, so that they cannot drift."""

from __future__ import annotations

from enum import Enum
from typing import Any

HEADER = """\
# Configuration

The container reads its environment only: every setting is a variable. On the command line the same setting is an
option: `SERVE_MAX_QUEUE=8` is `--max-queue 8`. An argument wins over the environment, the environment over a `.env`
file, that over the default. An empty variable counts as unset. A wrong value stops the start with status 2 and the
variable's name.

This page is made by `scripts/reference`.

| variable | default | what it does |
|---|---|---|
"""


def configuration() -> str:
    """The table of all settings, in Markdown."""
    from serve.settings import PREFIX, Settings  # noqa: PLC0415

    rows = [
        f"| `{PREFIX}{name.upper()}` | {_shown(field.default)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return HEADER + "\n".join(rows) + "\n"


def _shown(value: Any) -> str:
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value.value if isinstance(value, Enum) else value}`"
