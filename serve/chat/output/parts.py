"""What a model's text is taken apart into, and the tools that its calls may name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast


@dataclass(frozen=True, slots=True)
class Call:
    """A complete call.  ``arguments`` is the text of a JSON object; ``id`` is the model's own where it gives one."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is added to call ``index``.  The first delta of a call has its id and name."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one kind: exactly one of the fields says something."""

    content: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


class Tools:
    """The tools of one request, by name.

    Args:
        tools: In OpenAI's form.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._schemas: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool["function"]
            parameters = function.get("parameters")
            self._schemas[function["name"]] = parameters if isinstance(parameters, Mapping) else {}

    def __contains__(self, name: str) -> bool:
        return name in self._schemas

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemas)

    def __len__(self) -> int:
        return len(self._schemas)

    def value(self, name: str, key: str, text: str) -> Any:
        """An argument that the model wrote without quotes, as the type that the tool's schema names."""
        properties: Any = self._schemas.get(name, {}).get("properties")
        schema: Any = cast("Mapping[str, Any]", properties).get(key) if isinstance(properties, Mapping) else None
        types = _types(schema)
        if types == {"string"}:
            return text
        try:
            value = parse_json(text.strip())
        except ValueError:
            return _literal(text, types)
        if "string" in types and not _is_of(value, types - {"string"}):
            return text
        return value


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema allows; empty: it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    found = cast("Mapping[str, Any]", schema)
    kind: Any = found.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {str(name) for name in cast("list[Any]", kind)}
    if isinstance(values := found.get("enum"), list):
        return {_type(value) for value in cast("list[Any]", values)}
    options: list[Any] = [*(found.get("anyOf") or ()), *(found.get("oneOf") or ())]
    return set[str]().union(*map(_types, options[:100]))


def _type(value: Any) -> str:
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _is_of(value: Any, types: set[str]) -> bool:
    kind = _type(value)
    return kind in types or (kind == "integer" and "number" in types)


def _literal(text: str, types: set[str]) -> Any:
    """Python's spelling of a constant, where the schema asks for one; else the text."""
    wanted = {"True": (True, "boolean"), "False": (False, "boolean"), "None": (None, "null")}.get(text.strip())
    return wanted[0] if wanted and wanted[1] in types else text


def parse_json(text: str) -> Any:
    """A JSON value, strictly.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def arguments_text(value: Any) -> str | None:
    """Arguments as a model gave them, as the text of an object; None: they are something else."""
    if value is None:
        return "{}"
    if isinstance(value, str):  # written twice as JSON
        try:
            value = parse_json(value) if value.strip() else {}
        except ValueError:
            return None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def call_of_object(value: Any, call_id: str | None = None) -> Call | None:
    """The call that ``{"name": ..., "arguments": {...}}`` stands for; None: it is none."""
    if not isinstance(value, dict):
        return None
    found = cast("dict[str, Any]", value)
    function = found.get("function")
    if isinstance(function, dict):
        found = cast("dict[str, Any]", function)
    name: Any = found.get("name", function if isinstance(function, str) else None)
    arguments = arguments_text(found.get("arguments", found.get("parameters")))
    if not isinstance(name, str) or not name or arguments is None:
        return None
    return Call(name, arguments, call_id)
