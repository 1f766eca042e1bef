"""Kimi K2: a section of calls, each with the id ``functions.name:index`` and JSON arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence

from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Call, arguments_text, parse_json
from serve.chat.output.reader import Markers, Reading

_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_BEGIN, _ARGUMENTS, _END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_NEXT, _END_OF_CALL = Markers(_BEGIN, _SECTION_END), Markers(_END, _SECTION_END)
_ID_END = Markers(_ARGUMENTS, _END, _SECTION_END)
_ID = re.compile(r"(?:functions\.)?([\w.-]+?)(?::\d+)?")


class KimiParser(OutputParser):
    """The model's ids are kept: its template shows them to it again."""

    openers = (_SECTION,)
    marks = (_SECTION_END, _BEGIN, _ARGUMENTS, _END)

    def _read_call(self, marker: str) -> Reading[Sequence[Call] | None]:
        del marker  # there is only one
        reader, calls = self.reader, list[Call]()
        while True:
            _, opener = yield from reader.text_until(_NEXT)
            if opener != _BEGIN:
                return calls if opener or self.is_truncated else None
            call_id, separator = yield from reader.text_until(_ID_END)
            text, end = yield from reader.json_until(_END_OF_CALL)
            found, arguments = _ID.fullmatch(call_id.strip()), _arguments(text)
            if separator != _ARGUMENTS or end is None or found is None or arguments is None:
                return calls if self.is_truncated and reader.is_read else None
            calls.append(Call(found[1], arguments, call_id.strip()))
            if end == _SECTION_END:
                return calls


def _arguments(text: str) -> str | None:
    try:
        return arguments_text(parse_json(text) if text.strip() else None)
    except ValueError:
        return None
