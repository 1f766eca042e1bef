"""A JSON Schema of ``trimaran.toml``, for editors: made from the settings and from the deploy commands themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from serve.setting_file import SECTIONS, section_of
from serve.setting_values import secret_names
from serve.settings import Settings

Json = dict[str, Any]
LIST: Json = {"type": "array", "items": {"type": "string"}}
TYPES: dict[str, Json] = {
    "integer": {"type": "integer"}, "integer range": {"type": "integer"}, "float": {"type": "number"},
    "boolean": {"type": "boolean"},
}  # fmt: skip
NOT_IN_FILES = frozenset(
    {"dry_run", "wait", "write", "owner", "cached_model", "unset", "version", "json"}
    | {"verify", "verify_local", "verify_reference", "verify_wait", "verify_header", "verify_key"}
)
"""Options that say what one run shall do."""


def schema_text() -> str:
    """The schema as its file has it."""
    from trimaran.doctor.setup import modal_knobs  # noqa: PLC0415

    return json.dumps(schema(modal_knobs()), indent=2) + "\n"


def schema(modal_knobs: Mapping[str, tuple[str, str]]) -> Json:
    """The schema.

    Args:
        modal_knobs: Of the Modal adapter: name to default and description.
    """
    from trimaran.deploy.render import render  # noqa: PLC0415
    from trimaran.deploy.runpod import runpod  # noqa: PLC0415

    known: Json = Settings.model_json_schema(by_alias=False)
    secrets = secret_names(Settings.model_fields)
    sections: Json = {name: _section({}) for name in SECTIONS}
    for name, described in known["properties"].items():
        if name not in secrets:
            sections[section_of(name)]["properties"][name] = _without_title(described)
    sections["modal"] = _section({name.lower(): _knob(*about) for name, about in modal_knobs.items()})
    for name, command in (("runpod", runpod), ("render", render)):
        sections[name] = _section(dict(_option(key, option) for key, option in file_options(command).items()))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "trimaran.toml",
        "type": "object",
        "properties": sections,
        "additionalProperties": False,
        "$defs": known.get("$defs", {}),
    }


def file_options(command: click.Command) -> dict[str, click.Option]:
    """A deploy command's options that its section may hold, by their names there."""
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    named = {option.opts[0].removeprefix("--").replace("-", "_"): option for option in options}
    return {name: option for name, option in named.items() if name not in NOT_IN_FILES}


def _section(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _without_title(described: Json) -> Json:
    return {key: value for key, value in described.items() if key not in {"title", "format"}}


def _knob(default: str, description: str) -> Json:
    types = ["string", "integer", "number", "boolean", "array"]
    return {"description": description, "type": types, **({"default": default} if default else {})}


def _option(name: str, option: click.Option) -> tuple[str, Json]:
    kind: Json = dict(TYPES.get(option.type.name, {"type": "string"}))
    if isinstance(option.type, click.Choice):
        kind = {"enum": [str(choice) for choice in option.type.choices]}  # pyright: ignore
    if option.multiple:
        kind = dict(LIST)
    return name, {"description": option.help or "", **kind}
