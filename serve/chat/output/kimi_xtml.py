"""Kimi K3: elements between control tokens, ``<|open|>name key="value"<|sep|>`` to ``<|close|>name<|sep|>``."""

from __future__ import annotations

import html
import json
import re
from typing import Any

from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Call, parse_json
from serve.chat.output.reader import Markers, Reading

_OPEN, _CLOSE, _SEP = "<|open|>", "<|close|>", "<|sep|>"
_EDGES = Markers(_OPEN, _CLOSE)
_TAG_END = Markers(_SEP)
_THINK_END = Markers("<|close|>think<|sep|>")
_ARGUMENT_END = Markers("<|close|>argument<|sep|><|open|>argument ", "<|close|>argument<|sep|><|close|>call<|sep|>")
_ATTRIBUTE = re.compile(r'([\w-]+)="([^"]*)"')


class KimiXtmlParser(OutputParser):
    """Think, response and tools are elements of the message."""

    think_openers = ("<|open|>think<|sep|>",)
    always = True
    marks = (_OPEN, _CLOSE, _SEP)

    def _read(self) -> Reading[None]:
        reader = self.reader
        if self.is_reasoning:
            yield from self._think_through()
        while True:
            edge = yield from reader.until(_EDGES, self.say)
            if edge is None:
                return
            reader.start_record(edge)
            tag, end = yield from reader.text_until(_TAG_END)
            if end is None:
                return
            if edge == _OPEN and tag == "think":
                yield from self._think_through()
            elif edge == _OPEN and tag.startswith("call ") and self.reads_calls:
                call = yield from self._read_element(tag)
                if call is not None:
                    self.give([call])
                elif not (self.is_truncated and reader.is_read):
                    self.say(reader.record)

    def _think_through(self) -> Reading[None]:
        self.is_reasoning = True
        yield from self.reader.until(_THINK_END, self._think)
        self.is_reasoning = False

    def _read_element(self, tag: str) -> Reading[Call | None]:
        """The arguments of a call up to its end, each with the type that the model states."""
        reader, arguments = self.reader, dict[str, Any]()
        name = _attributes(tag).get("tool")
        if not name:
            return None
        start = yield from reader.one_of(("<|open|>argument ", "<|close|>call<|sep|>"))
        is_open = start == "<|open|>argument "
        if start is None:
            return None
        while is_open:
            head, end = yield from reader.text_until(_TAG_END)
            text, edge = yield from reader.text_until(_ARGUMENT_END)
            attributes = _attributes(head)
            if end is None or edge is None or "key" not in attributes:
                return None
            arguments[attributes["key"]] = _value(text, attributes.get("type", "string"))
            is_open = edge.endswith("argument ")
        return Call(name, json.dumps(arguments, ensure_ascii=False))


def _attributes(tag: str) -> dict[str, str]:
    return {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(tag)}


def _value(text: str, kind: str) -> Any:
    if kind == "string":
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text
