"""Gemma: ``<|tool_call>call:name{key:value}<tool_call|>``, where strings stand between marks of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Call, parse_json
from serve.chat.output.reader import Markers, Reading

MAX_DEPTH = 64
_QUOTE = '<|"|>'
_CLOSE = "<tool_call|>"
_NAME = re.compile(r"\s*call:\s*([\w.-]{1,256})\s*")
_PLAIN = re.compile(r"[^,}\]\[{]*")
_KEY = re.compile(r"\s*([^:{}\[\]]*?)\s*:")
_BLANK = re.compile(r"\s*")


class GemmaParser(OutputParser):
    """Reasoning is a channel of its own."""

    openers = ("<|tool_call>",)
    marks = (_QUOTE, _CLOSE, "<|channel>")
    think_openers = ("<|channel>thought",)
    think_closers = ("<channel|>",)

    def _read_call(self, marker: str) -> Reading[Sequence[Call] | None]:
        del marker  # there is only one
        reader, pieces = self.reader, list[str]()
        markers = Markers(_QUOTE, _CLOSE)
        while True:
            text, end = yield from reader.text_until(markers)
            pieces.append(text)
            if end == _CLOSE:
                return _call(pieces)
            if end is None:
                return None
            text, end = yield from reader.text_until(Markers(_QUOTE))
            if end is None:
                return None
            pieces += (_QUOTE, json.dumps(text), _QUOTE)


def _call(pieces: Sequence[str]) -> Sequence[Call] | None:
    """Strings are JSON by now, each between two quote marks."""
    text = "".join(pieces)
    found = _NAME.match(text)
    if found is None:
        return None
    try:
        value, end = _Values(text).read(found.end(), 0)
    except (ValueError, IndexError):
        return None
    if not isinstance(value, Mapping) or text[end:].strip():
        return None
    return [Call(found[1], json.dumps(value, ensure_ascii=False))]


class _Values:
    """Reads values at places of a text: each character once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._decoder = json.JSONDecoder()

    def read(self, at: int, depth: int) -> tuple[Any, int]:
        """The value at a place, and the place after it.  Raises ``ValueError`` or ``IndexError``."""
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        at = self._after_blank(at)
        if self._text.startswith(_QUOTE, at):
            value, end = self._decoder.raw_decode(self._text, at + len(_QUOTE))
            return value, end + len(_QUOTE)
        if self._text[at] == "{":
            return self._object(at + 1, depth)
        if self._text[at] == "[":
            return self._array(at + 1, depth)
        found = _PLAIN.match(self._text, at)
        plain = found[0] if found else ""
        try:
            return parse_json(plain), at + len(plain)
        except ValueError:
            return plain.strip(), at + len(plain)

    def _object(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        while self._text[at := self._after_blank(at)] != "}":
            if self._text.startswith(_QUOTE, at):
                key, at = self.read(at, depth)
                if self._text[at] != ":":
                    raise ValueError("a key without a value")
                at += 1
            elif found := _KEY.match(self._text, at):
                key, at = found[1], found.end()
            else:
                raise ValueError("no key")
            values[key], at = self.read(at, depth + 1)
            at = self._after_comma(at, "}")
        return values, at + 1

    def _array(self, at: int, depth: int) -> tuple[list[Any], int]:
        values: list[Any] = []
        while self._text[at := self._after_blank(at)] != "]":
            value, at = self.read(at, depth + 1)
            values.append(value)
            at = self._after_comma(at, "]")
        return values, at + 1

    def _after_comma(self, at: int, closer: str) -> int:
        at = self._after_blank(at)
        if self._text[at] not in {",", closer}:
            raise ValueError("no comma")
        return at + (self._text[at] == ",")

    def _after_blank(self, at: int) -> int:
        found = _BLANK.match(self._text, at)
        return found.end() if found else at
