"""Mistral: ``[TOOL_CALLS]`` with a JSON array (v3), or with a name and ``[ARGS]`` or plain JSON for each call."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Sequence

from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Call, call_of_object, parse_json
from serve.chat.output.reader import Markers, Reading

_ALPHABET = string.ascii_letters + string.digits
_END_OF_NAME = Markers("[ARGS]", "[CALL_ID]", "{", "[TOOL_CALLS]", "\n")
_ID = Markers("[ARGS]", "{")
_NAME = re.compile(r"[\w.:/-]{1,256}")


def new_call_id() -> str:
    """Mistral's templates take ids of nine letters and digits only."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class MistralParser(OutputParser):
    """The end of a call is the end of its JSON."""

    openers = ("[TOOL_CALLS]",)
    marks = ("[ARGS]", "[CALL_ID]")
    think_openers = ("[THINK]", "<think>")
    think_closers = ("[/THINK]", "</think>")
    call_ends_reasoning = False
    new_id = staticmethod(new_call_id)

    def _read_call(self, marker: str) -> Reading[Sequence[Call] | None]:
        reader = self.reader
        yield from reader.space()
        text = yield from reader.json()
        if text is not None:
            return _from_array(text)
        if reader.record.strip() != marker:
            return None
        name, end = yield from reader.text_until(_END_OF_NAME)
        call_id = None
        if end == "[CALL_ID]":
            call_id, end = yield from reader.text_until(_ID)
        if end == "{":
            arguments = yield from reader.json(opened="{")
        elif end == "[ARGS]":
            yield from reader.space()
            arguments = yield from reader.json()
        else:
            return None
        if arguments is None or not _NAME.fullmatch(name.strip()):
            return None
        try:
            call = call_of_object({"name": name.strip(), "arguments": parse_json(arguments)}, call_id)
        except ValueError:
            return None
        return [call] if call else None


def _from_array(text: str) -> Sequence[Call] | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    calls: list[Call] = []
    for entry in value if isinstance(value, list) else [value]:  # pyright: ignore[reportUnknownVariableType]
        call_id = entry.get("id") if isinstance(entry, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        call = call_of_object(entry, call_id if isinstance(call_id, str) and call_id else None)
        if call is None:
            return None
        calls.append(call)
    return calls
