"""Llama: an answer that is nothing but JSON calls (Llama 3) or Python calls (Llama 4)."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from typing import Any

from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Call, call_of_object, parse_json
from serve.chat.output.reader import Reading

MAX_PYTHON_CHARS = 64 * 1024
"""Python's own parser reads these calls; it is quick, but not meant for more."""

_STARTS = ("<|python_tag|>", "<|python_start|>")
_END = "<|python_end|>"


class LlamaParser(OutputParser):
    """Without a mark, an answer is read as calls from its beginning or not at all."""

    openers = _STARTS
    marks = (_END,)

    def _read(self) -> Reading[None]:
        reader = self.reader
        reader.start_record()
        if self.reads_calls:
            yield from reader.space()
            is_marked = (yield from reader.one_of(_STARTS)) is not None
            yield from reader.space()
            calls = yield from self._read_calls()
            if calls and all(call.name in self.tools for call in calls):
                self.give(calls)
                yield from reader.space()
                yield from reader.one_of((_END,))
            elif not (self.is_truncated and reader.is_read and (is_marked or self._looks_like_calls())):
                self.say(reader.record)
        yield from super()._read()

    def _read_call(self, marker: str) -> Reading[Sequence[Call] | None]:
        del marker
        yield from self.reader.space()
        calls = yield from self._read_calls()
        yield from self.reader.one_of((_END,))
        return calls or None

    def _looks_like_calls(self) -> bool:
        return any(f'"{name}"' in self.reader.record or f"[{name}(" in self.reader.record for name in self.tools)

    def _read_calls(self) -> Reading[Sequence[Call]]:
        reader, calls = self.reader, list[Call]()
        while (text := (yield from reader.json(is_python=True))) is not None:
            found = list(_json_calls(text)) or list(_python_calls(text))
            if not found:
                return []
            calls += found
            yield from reader.space()
            if not (yield from reader.one_of((";", ","))):
                break
            yield from reader.space()
        return calls


def _json_calls(text: str) -> Iterator[Call]:
    try:
        value = parse_json(text)
    except ValueError:
        return
    for entry in value if isinstance(value, list) else [value]:  # pyright: ignore[reportUnknownVariableType]
        if call := call_of_object(entry):
            yield call


def _python_calls(text: str) -> Iterator[Call]:
    """The calls in ``[f(a=1), g()]``; arguments are literals, nothing is run."""
    if len(text) > MAX_PYTHON_CHARS:
        return
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else []
        calls = [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return
    yield from calls


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name | ast.Attribute):
        raise ValueError("no call with named arguments")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("an argument without a name")
        arguments[keyword.arg] = _literal(keyword.value)
    return Call(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False))


def _literal(node: ast.expr) -> Any:
    """JSON's constants too, which models mix in."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None}[node.id] if node.id in {"true", "false", "null"} else _no()
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else _no() for key in node.keys]
        return dict(zip(keys, map(_literal, node.values), strict=True))
    return ast.literal_eval(node)


def _no() -> Any:
    raise ValueError("not a literal")
