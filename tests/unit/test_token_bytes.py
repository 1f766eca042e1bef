"""The bytes of single tokens joined are the bytes of the text, for each kind of tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serve.chat.token_bytes import TokenBytes
from serve.chat.tokenizer import HubTokenizer

TEXTS = st.text(alphabet="ab c,\né漢👩‍👩‍👧🫠", max_size=30)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "Ġa", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def byte_fallback() -> Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a", "é"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


KINDS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_token_bytes_joined_are_the_text(kind, text):
    tokenizer = KINDS[kind]
    subject = TokenBytes(tokenizer)
    ids = tokenizer.encode(text).ids
    assert b"".join(subject[token_id] for token_id in ids).decode() == text
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_stand_for_their_names_and_unknown_ids_for_nothing(kind):
    tokenizer = Tokenizer.from_str(KINDS[kind].to_str())
    tokenizer.add_special_tokens([AddedToken("<|é▁nd|>", special=True)])
    subject = TokenBytes(tokenizer)
    token_id = tokenizer.token_to_id("<|é▁nd|>")
    assert token_id is not None
    assert subject[token_id] == "<|é▁nd|>".encode()
    assert subject[10**6] == b""


def test_plain_tokenizer_gives_what_it_decodes():
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    assert TokenBytes(tokenizer)[1] == b"two"


def test_hub_tokenizer_knows_the_bytes_of_its_tokens(tmp_path):
    content: dict[str, Any] = json.loads(byte_level().to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    subject = HubTokenizer(tmp_path)
    assert b"".join(map(subject.token_bytes, subject.encode("é漢"))).decode() == "é漢"
