"""``<tool_call>`` families: hermes and Qwen (JSON inside), Qwen3-Coder and later (XML-like), GLM (keys and values)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Call, call_of_object, parse_json
from serve.chat.output.reader import Markers, Reading

_CLOSE, _FUNCTION = "</tool_call>", "<function="
_END_OF_NAME = Markers(">", "\n<")
_ENDS_OF_VALUE = ("</parameter>", "<parameter=", "</function>")
_END_OF_VALUE, _END_OF_LINES = Markers(*_ENDS_OF_VALUE), Markers(*(f"\n{end}" for end in _ENDS_OF_VALUE))
_END_OF_KEY, _END_OF_ARGUMENT = Markers("</arg_key>", "<arg_value>"), Markers("</arg_value>")
_GLM_NEXT = Markers("<arg_key>", _CLOSE, "<tool_call>")


class TaggedParser(OutputParser):
    """The first character after the tag tells the families apart."""

    openers = ("<tool_call>", _FUNCTION)
    marks = (_CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</function>", "</parameter>")

    def _read_call(self, marker: str) -> Reading[Sequence[Call] | None]:
        reader = self.reader
        if marker == _FUNCTION:
            return (yield from self._read_function())
        yield from reader.space()
        text = yield from reader.json()
        if text is not None:
            yield from self._skip_close()
            return _from_json(text)
        if reader.record.strip() != marker:  # a JSON text that does not end
            return None
        if (yield from reader.one_of((_FUNCTION,))):
            return (yield from self._read_function())
        return (yield from self._read_keys())

    def _skip_close(self) -> Reading[None]:
        yield from self.reader.space()
        yield from self.reader.one_of((_CLOSE,))

    def _read_function(self) -> Reading[Sequence[Call] | None]:
        """``name>`` and parameters up to ``</function>``, of which a model may forget one or another closing tag."""
        reader = self.reader
        name, end = yield from reader.text_until(_END_OF_NAME)
        arguments: dict[str, Any] = {}
        if end != ">" or not name.strip():
            return None
        name = name.strip()
        yield from reader.space()
        marker = yield from reader.one_of(("<parameter=", "</function>"))
        while marker == "<parameter=":
            key, end = yield from reader.text_until(_END_OF_NAME)
            if end != ">":
                return None
            text, marker = yield from self._read_value()
            arguments[key.strip()] = self.tools.value(name, key.strip(), text)
            if marker == "</parameter>":
                yield from reader.space()
                marker = yield from reader.one_of(("<parameter=", "</function>"))
        if not marker and not (yield from reader.one_of((_CLOSE,))):
            return None
        if marker:
            yield from self._skip_close()
        return [Call(name, json.dumps(arguments, ensure_ascii=False))]

    def _read_value(self) -> Reading[tuple[str, str]]:
        """A parameter and the tag behind it.  One that begins on a line of its own also ends there."""
        if not (yield from self.reader.one_of(("\n",))):
            text, marker = yield from self.reader.text_until(_END_OF_VALUE)
            return text, marker or ""
        text, marker = yield from self.reader.text_until(_END_OF_LINES)
        return text, (marker or "").strip()

    def _read_keys(self) -> Reading[Sequence[Call] | None]:
        """``name<arg_key>k</arg_key><arg_value>v</arg_value>`` and so on up to ``</tool_call>``."""
        reader = self.reader
        name, marker = yield from reader.text_until(_GLM_NEXT)
        name = name.strip()
        arguments: dict[str, Any] = {}
        while marker == "<arg_key>":
            key, end = yield from reader.text_until(_END_OF_KEY)
            if end == "</arg_key>":
                yield from reader.space()
                end = yield from reader.one_of(("<arg_value>",))
            if end is None:
                return None
            text, end = yield from reader.text_until(_END_OF_ARGUMENT)
            if end is None and not text.rstrip().endswith(_CLOSE):
                return None
            if end is None:  # the last closing tag was forgotten
                text, marker = text.rstrip().removesuffix(_CLOSE), _CLOSE
            arguments[key.strip()] = self.tools.value(name, key.strip(), text)
            if end is not None:
                yield from reader.space()
                marker = yield from reader.one_of(("<arg_key>", _CLOSE))
        if marker != _CLOSE or not name or any(character in name for character in "<>{}\n "):
            return None
        return [Call(name, json.dumps(arguments, ensure_ascii=False))]


def _from_json(text: str) -> Sequence[Call] | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    calls = [call_of_object(entry) for entry in (value if isinstance(value, list) else [value])]  # pyright: ignore[reportUnknownVariableType]
    known = [call for call in calls if call is not None]
    return known if len(known) == len(calls) else None
