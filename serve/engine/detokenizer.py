"""Token ids of one sequence to text, piece by piece: whole characters only, and nothing of a stop string.

Torch-free.  The pieces joined are the same whatever the steps in which the tokens came.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.engine.base import Decode

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A byte-level decoder shows an incomplete character as one U+FFFD, a byte-fallback decoder as one for each of
# at most three bytes.
MAX_HELD_MARKS = 3
# Decoding starts this many tokens back at most; bytes that never become a character stop being held there.
WINDOW_TOKENS = 16
MAX_WINDOW_TOKENS = 64


class IncrementalDecoder:
    """Decodes a growing list of token ids without ever showing half a character.

    Each push decodes a short window that starts at a character boundary, because a decoder may treat the first
    token of a text differently (a leading space).
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_sent = 0  # characters of the window's text that were already returned
        self._boundary = 0  # last index in the window before which the text ends with a whole character
        self.is_whole = True
        """Whether the tokens so far end with a whole character."""

    def push(self, token_id: int) -> str:
        """Add one token; return the text that became certain."""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = _without_incomplete(text)
        if len(certain) != len(text) and len(self._window) > MAX_WINDOW_TOKENS:
            certain = text
        piece = certain[self._num_sent :]
        self._num_sent = max(self._num_sent, len(certain))
        self.is_whole = len(certain) == len(text)
        if self.is_whole:
            self._shorten()
        return piece

    def _shorten(self) -> None:
        if len(self._window) > WINDOW_TOKENS and self._boundary:
            self._window = self._window[self._boundary :]
            self._num_sent = len(self._decode(self._window))
        self._boundary = len(self._window)


def _without_incomplete(text: str) -> str:
    end = len(text)
    while end and len(text) - end < MAX_HELD_MARKS and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]


class StopChecker:
    """Finds the first stop string in a growing text; holds back what may still become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Add text; return what is certainly not part of a stop string, and the stop string that was found."""
        if not self._stop:
            return piece, None
        text = self._held + piece
        hits = [(at, number) for number, stop in enumerate(self._stop) if (at := text.find(stop)) >= 0]
        if hits:
            at, number = min(hits)
            self._held = ""
            return text[:at], self._stop[number]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text ended without a stop string: what was held is text after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Detokenizer:
    """One sequence's tokens to text pieces, up to the first stop string."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decoder = IncrementalDecoder(decode)
        self._checker = StopChecker(stop)
        self.num_decoded = 0
        """Characters of all tokens so far."""
        self.num_released = 0
        """Characters returned so far."""

    @property
    def holds_nothing(self) -> bool:
        """Whether everything that the tokens say was returned."""
        return self._decoder.is_whole and self.num_released == self.num_decoded

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Add one token; return new text and the stop string that ended it."""
        piece = self._decoder.push(token_id)
        self.num_decoded += len(piece)
        text, stop = self._checker.push(piece)
        self.num_released += len(text)
        return text, stop

    def flush(self) -> str:
        """Text still held back at the end.  An incomplete character is dropped, streamed or not."""
        return self._checker.flush()
