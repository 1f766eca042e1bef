"""Where chat templates run: a Jinja sandbox in which every loop and every call counts against a time limit.

Only the operator's templates run here, but a caller's messages decide how long their loops are.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve.errors import InvalidRequest, ModelLoadError

RENDER_LIMIT_S = 2.0
"""CPU seconds for one prompt; ordinary ones take a thousandth of it."""

MAX_RENDERED_CHARS = 64 * 2**20
_TICK = "_tick"

REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What a template raises when it cannot cope with the messages."""


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it only passes them through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

    def _pass(self, caller: Any) -> str:
        return caller()


class _OutOfTime(Exception):
    pass


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Compiles and runs templates.  Several threads may render at once."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols], autoescape=False
        )
        filters = cast("dict[str, Any]", self.filters)  # pyright: ignore[reportUnknownMemberType]
        filters.update({"tojson": _to_json, _TICK: self._ticking})
        names = cast("dict[str, Any]", self.globals)  # pyright: ignore[reportUnknownMemberType]
        names.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self._render = threading.local()

    def prepare(self, source: str) -> jinja2.Template:
        """Compile a template whose loops look at the clock.

        Raises:
            ModelLoadError: the source is not valid Jinja.
        """
        try:
            tree = self.parse(source)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, _TICK, [], [], None, None).set_lineno(loop.lineno)
            return self.from_string(tree)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the chat template is not valid Jinja: {error}") from error

    def variables(self, source: str) -> frozenset[str]:
        """What a template reads that it does not set itself."""
        return frozenset(meta.find_undeclared_variables(self.parse(source)))

    def run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The rendered text.

        Raises:
            InvalidRequest: the template refuses the variables, in its own words, or takes too long over them.
        """
        self._render.deadline = time.thread_time() + RENDER_LIMIT_S
        try:
            return _joined(template.generate(**variables))
        except REFUSALS as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise InvalidRequest(message, param="messages") from error
        except _OutOfTime:
            message = f"the model's chat template needs more than {RENDER_LIMIT_S:g} s for these messages; send fewer"
            raise InvalidRequest(message, param="messages") from None

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2 has it
        """Call from a template: macros may recurse without a loop."""
        __self._check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def _ticking(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._check_time()
            yield item

    def _check_time(self) -> None:
        if time.thread_time() > self._render.deadline:
            raise _OutOfTime


def _joined(pieces: Iterable[str]) -> str:
    text: list[str] = []
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise InvalidRequest(
                f"the model's chat template makes more than {MAX_RENDERED_CHARS} characters of these messages; "
                "send fewer",
                param="messages",
            )
        text.append(piece)
    return "".join(text)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without HTML escapes, as templates for models expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
