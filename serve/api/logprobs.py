"""Log-probabilities to the wires of chat and of text completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from serve.api.schemas.chat import ChatLogprob, TopLogprob
from serve.api.schemas.completions import CompletionLogprobs
from serve.types import TokenLogprob

TokenBytes = Callable[[int], bytes]
"""A token's bytes by its id."""

_CONTINUATION = range(0x80, 0xC0)
"""Bytes of UTF-8 that begin no character."""


def chat_logprobs(logprobs: Iterable[TokenLogprob], token_bytes: TokenBytes) -> list[ChatLogprob]:
    """As chat completions tell them: the bytes are exact, the token shows what is no character as U+FFFD."""
    return [
        ChatLogprob(
            token=_readable(data := token_bytes(entry.token_id)),
            bytes=list(data),
            logprob=entry.logprob,
            top_logprobs=[_top(token_bytes(token_id), logprob) for token_id, logprob in entry.top],
        )
        for entry in logprobs
    ]


def _top(data: bytes, logprob: float) -> TopLogprob:
    return TopLogprob(token=_readable(data), bytes=list(data), logprob=logprob)


def _readable(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


class TextLogprobs:
    """Those of one text completion, with the place of each token in the text."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._num_chars = 0
        self._unread = b""  # of the text: not yet some token's
        self._ahead = 0  # bytes of tokens whose text has not come yet

    def read(self, text: str, entries: Iterable[tuple[int, TokenLogprob | None]]) -> CompletionLogprobs:
        """The tokens that come with the next piece of text."""
        self._add_text(text)
        found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, entry in entries:
            data = self._token_bytes(token_id)
            found.text_offset.append(self._place(data))
            found.tokens.append(shown(data))
            found.token_logprobs.append(entry.logprob if entry else None)
            found.top_logprobs.append(self._top(entry) if entry else None)
        return found

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By token, best first, the token that was taken among them."""
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            found.setdefault(shown(self._token_bytes(token_id)), logprob)
        return found

    def _add_text(self, text: str) -> None:
        data = text.encode()
        num_read = min(self._ahead, len(data))
        self._ahead -= num_read
        self._unread += data[num_read:]

    def _place(self, data: bytes) -> int:
        """Characters before the token.  A token that the text does not show (the end, for one) takes no room in it."""
        if data[:1] == b" " and len(data) > 1 and not self._unread.startswith(b" "):
            data = data[1:]  # some tokenizers drop the space that begins a text
        begins_within = bool(data) and data[0] in _CONTINUATION and self._num_chars > 0
        offset = self._num_chars - begins_within
        shown = self._unread[: len(data)]
        if shown and data.startswith(shown):
            self._unread = self._unread[len(shown) :]
            self._ahead = len(data) - len(shown)
            self._num_chars += sum(byte not in _CONTINUATION for byte in data)
        return offset


def shown(data: bytes) -> str:
    """A token as text completions show it: what is no whole character as ``bytes:\\xe2\\x80``."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
