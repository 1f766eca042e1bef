"""The frame of all families' parsers: content and reasoning stream, a call is given out when it is complete.

A malformed call is text, exactly as the model wrote it, and one that max_tokens or a stop string cut off is left out:
a client that was already told half of it could not be told so any more.  Everything ends in :class:`Part` pieces that,
joined, do not depend on how the text was cut.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from serve.chat.output.parts import Call, CallDelta, Part, Tools
from serve.chat.output.reader import Markers, Reader, Reading

MAX_HELD_NEWLINES = 64
"""Line breaks before a call or at the end of the reasoning are no text; so many are waited for."""


def new_call_id() -> str:
    """As OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"


class OutputParser:
    """Reads one answer.  Families override :meth:`_read_call` and the markers.

    Args:
        tools: The request's.
        is_reasoning: The prompt has opened the reasoning already.
        reads_calls: Whether calls are looked for.
        thinks: Whether reasoning is.
    """

    openers: Sequence[str] = ()
    """What begins a call."""
    think_openers: Sequence[str] = ("<think>",)
    think_closers: Sequence[str] = ("</think>",)
    call_ends_reasoning = True
    """A model may call a tool without having closed its reasoning."""
    new_id = staticmethod(new_call_id)

    always = False
    """Whether plain answers have marks too, so that nothing is ever given out unread."""

    def __init__(
        self, tools: Tools, *, is_reasoning: bool = False, reads_calls: bool = True, thinks: bool = True
    ) -> None:
        self.tools = tools
        self.reader = Reader()
        self.is_reasoning = is_reasoning
        self.num_calls = 0
        self.is_cut = False
        """Whether the last call that was begun has no end."""
        self.is_truncated = False
        self.reads_calls = reads_calls
        self._think_openers = tuple(self.think_openers) if thinks else ()
        self._calls_openers = tuple(self.openers) if reads_calls else ()
        self._parts: list[Part] = []
        self._content = _Lines()
        self._reading: Reading[None] | None = self._read()

    marks: Sequence[str] = ()
    """What else its parser looks for."""

    @classmethod
    def all_marks(cls) -> Sequence[str]:
        """Every text that it looks for."""
        return (*cls.openers, *cls.think_openers, *cls.think_closers, *cls.marks)

    @classmethod
    def opens_reasoning(cls, prompt: str) -> bool:
        """Whether a prompt that ends like this leaves its reasoning open."""
        end = prompt.rstrip()
        return end.endswith(tuple(cls.think_openers))

    def push(self, text: str) -> list[Part]:
        """The parts that more text makes certain."""
        return self._taken() if self.reader.feed(text) else self._advance()

    def finish(self, *, is_truncated: bool) -> list[Part]:
        """The rest.  ``is_truncated``: the model would have written more."""
        self.is_truncated = is_truncated
        self.reader.end()
        parts = self._advance()
        if (rest := self._content.rest()) and not self.num_calls:
            parts.append(Part(content=rest))
        return parts

    def _advance(self) -> list[Part]:
        if self._reading is not None and next(self._reading, self) is self:
            self._reading = None
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _read(self) -> Reading[None]:
        if self.is_reasoning:
            yield from self.reader.one_of(self._think_openers)  # a model may open it once more
            yield from self._reason()
        markers = Markers(*self._calls_openers, *self._think_openers)
        while True:
            marker = yield from self.reader.until(markers, self.say)
            if marker is None:
                return
            if marker in self._think_openers:
                yield from self._reason()
            else:
                yield from self._read_marked(marker)

    def _read_marked(self, marker: str) -> Reading[None]:
        self.reader.start_record(marker)
        calls = yield from self._read_call(marker)
        if calls is not None:
            self.give(calls)
        elif not (self.is_truncated and self.reader.is_read):  # else the model was about to write a call
            self.say(self.reader.record)

    def _read_call(self, marker: str) -> Reading[Sequence[Call] | None]:
        """Read what follows an opener; None: it is no call."""
        raise NotImplementedError

    def _reason(self) -> Reading[None]:
        self.is_reasoning = True
        lines = _Lines(strips_first=True)
        markers = Markers(*self.think_closers, *(self._calls_openers if self.call_ends_reasoning else ()))
        marker = yield from self.reader.until(markers, lambda text: self._think(lines.add(text)))
        if marker is None:
            self._think(lines.rest())
        self.is_reasoning = False
        self._content.strip_next()
        if marker in self._calls_openers:
            yield from self._read_marked(str(marker))

    def _think(self, text: str) -> None:
        if text:
            self._parts.append(Part(reasoning=text))

    def say(self, text: str) -> None:
        """Give out content."""
        if said := self._content.add(text):
            self._parts.append(Part(content=said))

    def give(self, calls: Sequence[Call]) -> None:
        """Give out complete calls."""
        self._content.drop()
        self._content.strip_next()
        for call in calls:
            head = CallDelta(self.num_calls, "", call.id or self.new_id(), call.name)
            self._parts += [Part(call=head), Part(call=CallDelta(self.num_calls, call.arguments))]
            self.num_calls += 1


class _Lines:
    """Holds back line breaks until it is known that text follows them."""

    def __init__(self, *, strips_first: bool = False) -> None:
        self._held = ""
        self._strips_next = strips_first

    def strip_next(self) -> None:
        """Leave out the line breaks before the next text."""
        self._strips_next = True

    def add(self, text: str) -> str:
        """What is certain to be text."""
        if not (self._held or self._strips_next or text.endswith("\n")):
            return text
        text = self._held + text
        if self._strips_next:
            text = text.lstrip("\n")
        certain = text.rstrip("\n")
        if len(text) - len(certain) > MAX_HELD_NEWLINES:
            certain = text
        self._held = text[len(certain) :]
        self._strips_next = self._strips_next and not certain
        return certain

    def drop(self) -> None:
        """What is held is no text."""
        self._held = ""

    def rest(self) -> str:
        """The text has ended."""
        held, self._held = self._held, ""
        return held
