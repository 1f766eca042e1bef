"""The bytes that each single token stands for, also where they are no whole character."""

from __future__ import annotations

import json
import re
from typing import Any

SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's names of the bytes: printable ones are themselves, the others follow from U+0100 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in own)
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


class TokenBytes:
    """Looks tokens up in a Rust tokenizer.  Joined, they are the text's bytes.

    A space that a decoder strips from the beginning of a text stays in its token.
    """

    def __init__(self, rust: Any) -> None:
        self._rust = rust
        self._added: dict[int, str] = {
            token_id: token.content for token_id, token in rust.get_added_tokens_decoder().items()
        }
        decoder = json.dumps(json.loads(rust.decoder.__getstate__()), ensure_ascii=False) if rust.decoder else ""
        self._alphabet = _byte_level_alphabet() if '"ByteLevel"' in decoder else {}
        self._has_space_mark = SPACE_MARK in decoder
        self._has_byte_tokens = '"ByteFallback"' in decoder

    def __getitem__(self, token_id: int) -> bytes:
        """The token's bytes; none for an id that the tokenizer does not know."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self._rust.id_to_token(token_id)
        if piece is None:
            return b""
        if self._alphabet:
            known = [self._alphabet.get(character) for character in piece]
            return bytes(byte for byte in known if byte is not None) if None not in known else piece.encode()
        if self._has_byte_tokens and (found := BYTE_TOKEN.fullmatch(piece)):
            return bytes((int(found[1], 16),))
        if self._has_space_mark:
            return piece.replace(SPACE_MARK, " ").encode()
        return self._rust.decode([token_id], skip_special_tokens=False).encode()
