"""A tokenizer's control tokens inside the callers' texts: they are words there, not commands.

Whoever types ``<|im_end|>`` must not end a message.  Each control token in a text gets a separator after its first
character, which survives the template; the tokenizer knows the separator as a token of its own, so that the pieces
around it are encoded as text, and the separator's id is dropped.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

_WINDOW_CHARS = 1 << 16
"""One call of the regular expression holds the GIL: long texts are searched in pieces."""


class ControlTokens:
    """Separates the control tokens in texts.

    Args:
        special: Tokens that a tokenizer never makes of ordinary text.
        marks: Further tokens that look like commands (``<tool_call>``); an assistant's message may hold them, since
            templates read its reasoning and calls out of it.
    """

    def __init__(self, special: Iterable[str], marks: Iterable[str] = ()) -> None:
        # Nobody can guess it, so nobody can type it.  Letters and digits survive any template's filters.
        self.separator = f"sep{secrets.token_hex(16)}"
        special = set(special)
        self._special = _Finder(special)
        self._all = _Finder(special | set(marks))

    def in_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with all its texts separated, the role and the ids left alone."""
        finder = self._special if message.get("role") == "assistant" else self._all
        return {name: value if name == "role" else self._separated(value, finder) for name, value in message.items()}

    def in_value(self, value: Any) -> Any:
        """A JSON value with all its texts, keys included, separated."""
        return self._separated(value, self._all)

    def _separated(self, value: Any, finder: _Finder) -> Any:
        if isinstance(value, str):
            return finder.separate(value, self.separator)
        if isinstance(value, list | tuple):
            return [self._separated(item, finder) for item in cast("Sequence[Any]", value)]
        if isinstance(value, dict):
            items = cast("dict[Any, Any]", value).items()
            return {self._separated(key, finder): self._separated(item, finder) for key, item in items}
        return value


class _Finder:
    """Finds the places where any of some tokens begins, in time linear in the text."""

    def __init__(self, tokens: set[str]) -> None:
        tokens = {token for token in tokens if len(token) > 1}
        self._longest = max(map(len, tokens), default=0)
        self._pattern = re.compile(_trie_pattern(tokens)) if tokens else None

    def separate(self, text: str, separator: str) -> str:
        """``text`` with the separator after the first character of each token, overlapping ones included."""
        if self._pattern is None:
            return text
        pieces: list[str] = []
        done = start = 0
        while start < len(text):
            window = min(len(text), start + _WINDOW_CHARS)
            found = self._pattern.search(text, start, min(len(text), window + self._longest))
            if found is None:
                start = window
                continue
            start = found.start() + 1
            pieces += (text[done:start], separator)
            done = start
        return "".join(pieces) + text[done:] if pieces else text


def _trie_pattern(tokens: set[str]) -> str:
    """One pattern for all tokens that reads each character once: a tokenizer may have a thousand of them."""
    branches: dict[str, set[str]] = {}
    for token in tokens:
        if token:
            branches.setdefault(token[0], set()).add(token[1:])
    if "" in tokens or not branches:  # a shorter token ends here, and finding that one is enough
        return ""
    parts = [re.escape(first) + _trie_pattern(rest) for first, rest in sorted(branches.items())]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
