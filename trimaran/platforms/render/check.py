"""Everything that is wrong with a ``render.yaml``, all at once: one finding for each mistake.

First the shape (names, types, ranges), then the rules between fields.  The rules read what is there, whatever else is
wrong, so that one mistake does not hide the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from trimaran.platforms.render import fields, rules


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake: where, what, and what to do."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class _Loader(yaml.SafeLoader):
    """Keeps what a plain load loses: a key that occurs twice."""

    duplicates: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                self.duplicates.append(f"line {key.start_mark.line + 1}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def check_blueprint(text: str, root: Path) -> list[Finding]:
    """All findings of a Blueprint; none means that nothing known is wrong.

    Args:
        text: The file's content.
        root: The repository's root, where paths in the file start.
    """
    loader = _Loader(text)
    loader.duplicates = []
    try:
        document: Any = loader.get_single_data()
    except yaml.YAMLError as error:
        return [Finding("render.yaml", f"is not YAML: {' '.join(str(error).split())}")]
    findings = [Finding(place, "this key occurs twice; only the last would count") for place in loader.duplicates]
    if not isinstance(document, dict):
        return [*findings, Finding("render.yaml", "has no services; it must be a mapping with a list named services")]
    return [*findings, *_document(cast("dict[str, Any]", document), root)]


def _document(document: dict[str, Any], root: Path) -> Iterator[Finding]:
    yield from _shape(fields.Blueprint, document, "")
    services = rules.mappings(document.get("services"))
    groups = {str(group.get("name")) for group in rules.mappings(document.get("envVarGroups"))}
    for group in rules.mappings(document.get("envVarGroups")):
        yield from _found(f"envVarGroups.{group.get('name')}", rules.group_variables(group))
    names: set[str] = set()
    for index, service in enumerate(services):
        where = f"services[{index}]"
        yield from _shape(fields.WebService, _renamed(service), where)
        name = str(service.get("name"))
        if name in names:
            yield Finding(f"{where}.name", f"{name!r} is taken by another service of this file; names are unique")
        names.add(name)
        yield from _found(where, rules.service(_renamed(service), root, groups))


def _found(where: str, problems: Iterator[tuple[str, str]]) -> Iterator[Finding]:
    for field, message in problems:
        yield Finding(f"{where}.{field}", message)


def _renamed(service: Mapping[str, Any]) -> dict[str, Any]:
    """The service with ``runtime`` where only its old name ``env`` is given, so that this counts once."""
    return {**service, "runtime": service["env"]} if "env" in service and "runtime" not in service else dict(service)


def _shape(model: type[BaseModel], value: Mapping[str, Any], where: str) -> Iterator[Finding]:
    try:
        model.model_validate(dict(value))
    except ValidationError as error:
        seen: set[str] = set()
        for problem in error.errors():
            place = _place(where, problem["loc"])
            if place not in seen:  # each member of a union complains
                seen.add(place)
                yield Finding(place, _explain(problem))


def _place(where: str, location: tuple[int | str, ...]) -> str:
    text = where
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in {"str", "int", "float", "bool"}:  # members of a union
            text += f".{part}" if text else part
    return text


def _explain(problem: Any) -> str:
    name = str(problem["loc"][-1])
    if problem["type"] == "extra_forbidden":
        if name in fields.DEPRECATED:
            return f"is deprecated; use {fields.DEPRECATED[name]}"
        return "Render has no such field here (a health check has no interval or timeout); remove it"
    if problem["type"] == "missing":
        return "is missing; it is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}, not {problem['input']!r}"
