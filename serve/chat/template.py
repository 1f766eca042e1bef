"""Messages to prompt text through a model's Jinja chat template, in a sandbox.

Only the operator's templates are run: a template from a request is refused before it gets here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve.errors import InvalidRequest, ModelLoadError


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it only passes them through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

    def _pass(self, caller: Any) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON without HTML escapes, as templates for models expect."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja source.
        special_tokens: Variables such as ``bos_token``.

    Raises:
        ModelLoadError: the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            autoescape=False,
        )
        filters = cast("dict[str, Any]", environment.filters)  # pyright: ignore[reportUnknownMemberType]
        filters["tojson"] = _to_json
        names = cast("dict[str, Any]", environment.globals)  # pyright: ignore[reportUnknownMemberType]
        names.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the chat template is not valid Jinja: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, up to where the assistant speaks.

        Raises:
            InvalidRequest: the template refuses these messages; says so in the template's words.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
