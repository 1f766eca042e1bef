"""Text that arrives in pieces, read by generators that stop where they need more.

A generator that reads ``yield``s when the text at hand decides nothing; whoever feeds the reader resumes it.  Each
character is looked at a bounded number of times, and only what may still become a marker is kept, so that the cost is
linear however the text is cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
Sink = Callable[[str], object]

_STRUCTURE = re.compile(r'["{}\[\]]')
_PYTHON_STRUCTURE = re.compile(r"[\"'{}()\[\]]")
_STRING_END = {'"': re.compile(r'["\\]'), "'": re.compile(r"['\\]")}
_SPACE = re.compile(r"\s*")


class Markers:
    """Some fixed texts to look for.  None may be the beginning of another."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self._longest = max(map(len, texts), default=0)
        starts = "".join(sorted({text[0] for text in texts}))
        self._starts = re.compile(f"[{re.escape(starts)}]" if starts else "(?!)")
        self._pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")

    def may_begin_in(self, text: str) -> bool:
        """Whether a marker, or a beginning of one, can be in ``text``.  Cheap, and True too often."""
        return self._starts.search(text) is not None

    def find(self, text: str) -> tuple[int, str] | None:
        """Place and text of the first marker."""
        found = self._pattern.search(text)
        return (found.start(), found[0]) if found else None

    def unfinished(self, text: str) -> int:
        """Length of the longest end of ``text`` that may become a marker."""
        begin = max(0, len(text) - self._longest + 1)
        while found := self._starts.search(text, begin):
            tail = text[found.start() :]
            if any(marker.startswith(tail) for marker in self.texts):
                return len(tail)
            begin = found.start() + 1
        return 0


class Reader:
    """What is not read yet, and a record of what was, for when it turns out to mean nothing."""

    def __init__(self) -> None:
        self._text = ""
        self._is_ended = False
        self._record: list[str] = []
        self._passing: tuple[Markers, Sink] | None = None
        """Where text goes as it is, up to one of the markers, while everything before it was read."""

    def feed(self, text: str) -> bool:
        """More text.  True: it is read already, since nothing can begin in it that its reader waits for."""
        if self._passing is None or self._passing[0].may_begin_in(text):
            self._text += text
            return False
        self._record.append(text)
        self._passing[1](text)
        return True

    def end(self) -> None:
        """There is no more."""
        self._is_ended = True

    @property
    def is_read(self) -> bool:
        """Whether nothing is left, and nothing will come."""
        return self._is_ended and not self._text

    def start_record(self, text: str = "") -> None:
        """Record from here on, after ``text``."""
        self._record = [text]

    @property
    def record(self) -> str:
        """What was read since the record was started."""
        return "".join(self._record)

    def more(self) -> Reading[bool]:
        """Wait for text; False at the end."""
        if self._is_ended:
            return False
        yield
        return True

    def take(self, length: int) -> str:
        """The next ``length`` characters, which are there."""
        taken, self._text = self._text[:length], self._text[length:]
        self._record.append(taken)
        return taken

    def until(self, markers: Markers, sink: Sink) -> Reading[str | None]:
        """Read up to and including a marker; what comes before goes to ``sink``.  None: the text ended first."""
        while True:
            if found := markers.find(self._text):
                sink(self.take(found[0]))
                self.take(len(found[1]))
                return found[1]
            ready = len(self._text) - markers.unfinished(self._text)
            if ready:
                sink(self.take(ready))
            self._passing = None if self._text else (markers, sink)
            has_more = yield from self.more()
            self._passing = None
            if not has_more:
                sink(self.take(len(self._text)))
                return None

    def text_until(self, markers: Markers) -> Reading[tuple[str, str | None]]:
        """What comes before the next marker, and the marker."""
        pieces: list[str] = []
        marker = yield from self.until(markers, pieces.append)
        return "".join(pieces), marker

    def space(self) -> Reading[None]:
        """Skip blanks."""
        while True:
            found = _SPACE.match(self._text)
            self.take(found.end() if found else 0)
            if self._text or not (yield from self.more()):
                return

    def one_of(self, texts: Sequence[str]) -> Reading[str | None]:
        """Read the one of ``texts`` that comes next; None, and nothing read, when none does."""
        while True:
            for text in texts:
                if self._text.startswith(text):
                    self.take(len(text))
                    return text
            if not any(text.startswith(self._text) for text in texts) or not (yield from self.more()):
                return None

    def json(self, opened: str = "", *, is_python: bool = False) -> Reading[str | None]:
        """Read a JSON object or array by its brackets and strings; None: there is none, or it does not end.

        Args:
            opened: Its first bracket, where that was read already.
            is_python: It may be Python's spelling too, with its two kinds of quotes.
        """
        pieces: list[str] = []
        return "".join(pieces) if (yield from self._json_into(pieces.append, opened, is_python=is_python)) else None

    def json_through(self, sink: Sink) -> Reading[bool]:
        """Give a JSON object or array to ``sink`` piece by piece; False: it does not end."""
        return (yield from self._json_into(sink, "", is_python=False))

    def json_until(self, markers: Markers) -> Reading[tuple[str, str | None]]:
        """:meth:`text_until`, where markers inside the JSON that the text may begin with do not count."""
        pieces: list[str] = []
        yield from self.space()
        yield from self._json_into(pieces.append, "", is_python=False)
        marker = yield from self.until(markers, pieces.append)
        return "".join(pieces), marker

    def _json_into(self, sink: Sink, opened: str, *, is_python: bool) -> Reading[bool]:
        structure = _PYTHON_STRUCTURE if is_python else _STRUCTURE
        opened = opened or (yield from self.one_of("{[")) or ""
        sink(opened)
        depth = len(opened)
        while depth:
            if (found := structure.search(self._text)) is None:
                sink(self.take(len(self._text)))
                if not (yield from self.more()):
                    return False
                continue
            sink(self.take(found.end()))
            if found[0] in _STRING_END:
                if not (yield from self._rest_of_string(sink, found[0])):
                    return False
            else:
                depth += 1 if found[0] in "{[(" else -1
        return bool(opened)

    def _rest_of_string(self, sink: Sink, quote: str) -> Reading[bool]:
        while True:
            found = _STRING_END[quote].search(self._text)
            if found and found[0] == quote:
                sink(self.take(found.end()))
                return True
            if found and len(self._text) > found.end():
                sink(self.take(found.end() + 1))  # the escaped character too
                continue
            sink(self.take(found.start() if found else len(self._text)))
            if not (yield from self.more()):
                return False
