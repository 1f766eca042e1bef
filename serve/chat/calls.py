"""Calls that the request demands: a grammar that leaves the model no choice, and the parser of what it allows.

All families write them alike here, since the text is never shown to anybody.  The arguments stream as they come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serve.chat.grammar import json_schema_grammar, named
from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import CallDelta, Part, Tools
from serve.chat.output.reader import Markers, Reading
from serve.errors import InvalidRequest

MAX_CALLS = 8
"""In one answer: a weak model would go on calling."""

_OPEN, _MIDDLE, _CLOSE = '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_END_OF_NAME, _NEXT = Markers(_MIDDLE), Markers(_OPEN)


def arguments_grammar(function: Mapping[str, Any], param: str) -> str:
    """The grammar of one function's arguments.

    Without ``strict``, keywords that cannot be enforced are left out of account.

    Raises:
        InvalidRequest: the schema is wrong, or not of an object.
    """
    schema = function.get("parameters")
    if schema is None:
        schema = _NO_ARGUMENTS
    check_arguments(schema, f"{param}.parameters")
    schema = {**schema, "type": "object"}
    return json_schema_grammar(schema, f"{param}.parameters", is_lenient=not function.get("strict"))


def check_arguments(schema: Mapping[str, Any] | None, param: str) -> None:
    """Refuse what no call's arguments can be.

    Raises:
        InvalidRequest: the schema, in the field ``param``, is not of an object.
    """
    kind = (schema or {}).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequest(f"{param} cannot be used: its type must be object, as a call's arguments are", param=param)


def calls_grammar(arguments: Mapping[str, str], *, is_single: bool) -> str:
    """The grammar of one call, or of several.

    Args:
        arguments: By the function's name, the grammar of its arguments.
        is_single: Exactly one call.
    """
    parts = {f"arguments{index}": text for index, text in enumerate(arguments.values())}
    calls = [json.dumps(f"{name}{_MIDDLE}") + f" @arguments{index}" for index, name in enumerate(arguments)]
    more = "" if is_single else f' ("\\n" call){{0,{MAX_CALLS - 1}}}'
    lark = f"start: call{more}\ncall: {json.dumps(_OPEN)} ({' | '.join(calls)}) {json.dumps(_CLOSE)}\n"
    return named(lark, parts)


class DemandedCallsParser(OutputParser):
    """Reads what :func:`calls_grammar` allows; any other text is content, whatever marks it holds.

    ``demands``: nothing but calls may come, so that any other text is a call that was cut off, and left out.
    """

    def __init__(
        self,
        tools: Tools,
        *,
        is_reasoning: bool = False,
        reads_calls: bool = True,
        thinks: bool = True,
        demands: bool = False,
    ) -> None:
        self._demands = demands
        super().__init__(tools, is_reasoning=is_reasoning, reads_calls=reads_calls, thinks=thinks)

    def _read(self) -> Reading[None]:
        reader = self.reader
        if self.is_reasoning or (self._think_openers and (yield from reader.one_of(tuple(self._think_openers)))):
            yield from self._reason()
        if not (self.reads_calls and (yield from reader.one_of((_OPEN,)))):
            yield from reader.until(Markers(), self._leave_out if self._demands else self.say)
            return
        while True:
            name, marker = yield from reader.text_until(_END_OF_NAME)
            if marker is None:
                return
            index = self.num_calls
            self.num_calls += 1
            self._parts.append(Part(call=CallDelta(index, "", self.new_id(), name)))
            yield from reader.space()  # a grammar of JSON allows one before the object
            whole = yield from reader.json_through(lambda text, index=index: self._add_arguments(index, text))
            self.is_cut = not whole
            _, marker = yield from reader.text_until(_NEXT)
            if marker is None:
                return

    def _leave_out(self, text: str) -> None:
        del text

    def _add_arguments(self, index: int, text: str) -> None:
        if text:
            self._parts.append(Part(call=CallDelta(index, text)))
