"""DeepSeek: calls as JSON between control tokens (V3, V3.1), or as DSML, an XML of its own (V3.2 and later)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Call, arguments_text, parse_json
from serve.chat.output.reader import Markers, Reading

_BEGIN, _SEP, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001 - as DeepSeek has it
_SECTION, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001
_DSML = "<｜DSML｜"  # noqa: RUF001
_CLOSE = "</｜DSML｜"  # noqa: RUF001
_END_OF_NAME = Markers(_SEP, _END, "\n\n")
_END_OF_TAG, _END_OF_VALUE = Markers(">"), Markers(_CLOSE)
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


class DeepSeekParser(OutputParser):
    """The section's opener tells the formats apart."""

    openers = (_SECTION, _BEGIN, _DSML)
    marks = (_SEP, _END, _SECTION_END, "｜DSML｜")  # noqa: RUF001

    def _read_call(self, marker: str) -> Reading[Sequence[Call] | None]:
        if marker == _DSML:
            return (yield from self._read_dsml())
        reader, calls = self.reader, list[Call]()
        is_open = marker == _BEGIN
        while True:
            yield from reader.space()
            if not is_open and not (yield from reader.one_of((_BEGIN,))):
                break
            call = yield from self._read_json_call()
            if call is None:
                return calls if self.is_truncated else None
            calls.append(call)
            is_open = False
        yield from reader.one_of((_SECTION_END,))
        return calls

    def _read_json_call(self) -> Reading[Call | None]:
        """``name<sep>{...}<end>``, or in V3 ``function<sep>name`` and the JSON in a fence."""
        reader = self.reader
        name, marker = yield from reader.text_until(_END_OF_NAME)
        if marker != _SEP:
            return None
        yield from reader.space()
        text = yield from reader.json()
        if text is None:
            name, marker = yield from reader.text_until(Markers("```json", _END))
            if marker != "```json":
                return None
            yield from reader.space()
            text = yield from reader.json()
        rest, marker = yield from reader.text_until(Markers(_END, _BEGIN))
        arguments = _arguments(text)
        if marker != _END or arguments is None or not name.strip() or rest.strip() not in {"", "```"}:
            return None
        return Call(name.strip(), arguments)

    def _read_dsml(self) -> Reading[Sequence[Call] | None]:
        """``<calls>`` with ``<invoke name="f">`` and ``<parameter name="k" string="true">`` inside."""
        reader, calls = self.reader, list[Call]()
        section = yield from self._read_tag()
        if section is None or not section.startswith(("function_calls", "tool_calls", "calls")):
            return None
        while True:
            yield from reader.space()
            opener = yield from reader.one_of((_DSML, _CLOSE))
            tag = yield from self._read_tag()
            if opener == _CLOSE and tag is not None:
                return calls
            attributes = dict(_ATTRIBUTE.findall(tag or ""))
            if opener is None or tag is None or not tag.startswith("invoke") or "name" not in attributes:
                return calls if self.is_truncated else None
            arguments = {} if tag.endswith("/") else (yield from self._read_parameters())
            if arguments is None:
                return calls if self.is_truncated else None
            calls.append(Call(attributes["name"], json.dumps(arguments, ensure_ascii=False)))

    def _read_parameters(self) -> Reading[dict[str, Any] | None]:
        reader, arguments = self.reader, dict[str, Any]()
        while True:
            yield from reader.space()
            opener = yield from reader.one_of((_DSML, _CLOSE))
            tag = yield from self._read_tag()
            if opener == _CLOSE and tag is not None:
                return arguments
            attributes = dict(_ATTRIBUTE.findall(tag or ""))
            if opener is None or tag is None or not tag.startswith("parameter") or "name" not in attributes:
                return None
            text, marker = yield from reader.text_until(_END_OF_VALUE)
            if marker is None or (yield from self._read_tag()) is None:
                return None
            arguments[attributes["name"]] = _value(text, attributes.get("string"))

    def _read_tag(self) -> Reading[str | None]:
        """What stands in a tag."""
        text, marker = yield from self.reader.text_until(_END_OF_TAG)
        return text.strip() if marker else None


def _arguments(text: str | None) -> str | None:
    try:
        return arguments_text(parse_json(text)) if text else None
    except ValueError:
        return None


def _value(text: str, is_string: str | None) -> Any:
    if is_string == "true":
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text
