"""Reference pages made from the code, so that they cannot drift."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, cast

HEADER = """\
# Configuration

The container reads its environment only: every setting is a variable. On the command line the same setting is an
option: `SERVE_MAX_QUEUE=8` is `--max-queue 8`. On your machine it may be a line of `trimaran.toml` too: `max_queue = 8`
(`trimaran init` writes one, `trimaran config --origin` shows what is in force). An argument wins over the environment,
that over a `.env` file, that over `trimaran.toml`, that over the default. An empty variable counts as unset. A wrong
value stops the start with status 2 and the variable's name.

This page is made by `scripts/reference`.

| variable | default | what it does |
|---|---|---|
"""

PLATFORM_HEADER = """\
# Configuration on {platform}

What only the adapter for {platform} reads, beside [the container's settings](configuration.md).  An empty variable
counts as unset.

This page is made by `scripts/reference`.

| variable | default | what it does |
|---|---|---|
"""


def configuration() -> str:
    """The table of all settings, in Markdown."""
    from serve.settings import Settings  # noqa: PLC0415

    return HEADER + _rows(Settings)


def platform_configuration(platform: str, settings: type[Any]) -> str:
    """The table of a platform adapter's own knobs, a pydantic-settings class, in Markdown."""
    return PLATFORM_HEADER.format(platform=platform) + _rows(settings)


def knob_configuration(platform: str, prefix: str, knobs: Mapping[str, tuple[str, str]]) -> str:
    """The same for an adapter in one file, whose knobs are a table of defaults and descriptions."""
    rows = [f"| `{prefix}{name}` | {_shown(default)} | {text} |" for name, (default, text) in knobs.items()]
    return PLATFORM_HEADER.format(platform=platform) + "\n".join(rows) + "\n"


def _rows(settings: type[Any]) -> str:
    prefix: str = settings.model_config["env_prefix"]
    rows = [
        f"| `{prefix}{name.upper()}` | {_shown(field.default)} | {field.description} |"
        for name, field in settings.model_fields.items()
    ]
    return "\n".join(rows) + "\n"


def _shown(value: Any) -> str:
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, cast('tuple[object, ...]', value)))}`"
    return f"`{value.value if isinstance(value, Enum) else value}`"
