"""A request's fields to the constraint on its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from serve.api.schemas.structured import JsonObjectFormat, JsonSchemaFormat, StructuredFields
from serve.chat.grammar import choice_grammar, json_schema_grammar, lark_grammar, regex_grammar
from serve.errors import InvalidRequest, UnsupportedParameter

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

MakeGrammar = Callable[[], str]
"""Reads a field into a grammar.  Raises ``InvalidRequest``."""


def constraint(body: StructuredFields) -> tuple[str, MakeGrammar] | None:
    """The field that constrains the text, and what makes its grammar; None: any text.

    Raises:
        InvalidRequest: several fields do.
        UnsupportedParameter: ``structured_outputs`` has an entry that is not implemented.
    """
    found = [*_of_format(body), *_of_outputs(body), *_of_guided(body)]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found[:2])
        raise InvalidRequest(f"{names} both constrain the text; send one of them", param=found[1][0])
    return found[0] if found else None


def _of_format(body: StructuredFields) -> Iterator[tuple[str, MakeGrammar]]:
    wanted = body.response_format
    if isinstance(wanted, JsonObjectFormat):
        yield "response_format", lambda: json_schema_grammar(ANY_OBJECT, "response_format")
    elif isinstance(wanted, JsonSchemaFormat):
        schema = ANY_OBJECT if wanted.json_schema.schema_ is None else wanted.json_schema.schema_
        name = "response_format.json_schema.schema"
        yield name, lambda: json_schema_grammar(schema, name)


def _of_outputs(body: StructuredFields) -> Iterator[tuple[str, MakeGrammar]]:
    outputs = body.structured_outputs
    if outputs is None:
        return
    for name, value in (outputs.model_extra or {}).items():
        if value not in (None, False):
            where = f"structured_outputs.{name[:64]}"
            raise UnsupportedParameter(f"{where} is not supported by this server; leave it out", param=where)
    yield from _of_values("structured_outputs.", outputs.json_, outputs.regex, outputs.choice, outputs.grammar)


def _of_guided(body: StructuredFields) -> Iterator[tuple[str, MakeGrammar]]:
    yield from _of_values("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)


def _of_values(
    prefix: str, schema: Mapping[str, Any] | str | None, regex: str | None, choice: list[str] | None, lark: str | None
) -> Iterator[tuple[str, MakeGrammar]]:
    if schema is not None:
        yield f"{prefix}json", lambda: json_schema_grammar(_schema(schema, f"{prefix}json"), f"{prefix}json")
    if regex is not None:
        yield f"{prefix}regex", lambda: regex_grammar(regex, f"{prefix}regex")
    if choice is not None:
        yield f"{prefix}choice", lambda: choice_grammar(choice, f"{prefix}choice")
    if lark is not None:
        yield f"{prefix}grammar", lambda: lark_grammar(lark, f"{prefix}grammar")


def _schema(value: Mapping[str, Any] | str, param: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"{param} is a string, but not JSON: {error}", param=param) from None
