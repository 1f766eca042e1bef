"""Oracles: whatever the tokens and the steps, the pieces joined are the text, without half characters or stops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.detokenizer import MAX_WINDOW_TOKENS, Detokenizer, IncrementalDecoder, StopChecker

TEXTS = st.text(alphabet="ab ,\né漢👩‍👩‍👧‍👦🫠", max_size=40)


def decode_bytes(token_ids: Any) -> str:
    return b"".join(token_ids).decode("utf-8", errors="replace")


def decode_fallback(token_ids: Any) -> str:
    """As a byte-fallback decoder: a run of bytes that is not UTF-8 gives one mark for each byte."""
    data = b"".join(token_ids)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        whole = data[: _whole(data)].decode("utf-8", errors="replace")
        return whole + "\ufffd" * (len(data) - _whole(data))


def _whole(data: bytes) -> int:
    for cut in range(len(data), max(len(data) - 4, -1), -1):
        try:
            data[:cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return cut
    return 0


@st.composite
def split_texts(draw):
    """A text, and its bytes cut at random places into tokens."""
    text = draw(TEXTS)
    data = text.encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=len(data))) | {0, len(data)})
    return text, [data[a:b] for a, b in pairwise(cuts)]


@given(split_texts(), st.sampled_from([decode_bytes, decode_fallback]))
def test_decoder_gives_the_same_text_for_any_split_into_tokens(case, decode):
    text, tokens = case
    decoder: Any = IncrementalDecoder(decode)
    pieces = [decoder.push(token) for token in tokens]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.binary(min_size=1, max_size=3), max_size=30))
def test_decoder_of_arbitrary_bytes_gives_a_prefix_of_the_whole_text(tokens):
    decoder: Any = IncrementalDecoder(decode_bytes)
    got = "".join(decoder.push(token) for token in tokens)
    whole = decode_bytes(tokens)
    assert whole.startswith(got)
    assert set(whole[len(got) :]) <= {"\ufffd"}


def test_decoder_window_stays_bounded_when_bytes_never_become_a_character():
    longest = 0

    def decode(token_ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode_bytes(token_ids)

    decoder: Any = IncrementalDecoder(decode)
    text = "".join(decoder.push(b"\xff") for _ in range(1000))
    assert len(text) >= 1000 - MAX_WINDOW_TOKENS
    assert longest <= MAX_WINDOW_TOKENS + 2


def test_decoder_keeps_the_space_that_the_first_token_of_a_text_loses():
    def decode(token_ids: Any) -> str:  # as a sentencepiece decoder strips the leading space
        return "".join(token_ids).replace("▁", " ").removeprefix(" ")

    decoder: Any = IncrementalDecoder(decode)
    words = [f"▁w{number}" for number in range(50)]
    assert "".join(decoder.push(word) for word in words) == decode(words)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_checker_cuts_at_the_earliest_stop_for_any_split(text, stops, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
    checker, got, stopped = StopChecker(stops), "", None
    seen = ""
    for a, b in pairwise(cuts):
        seen = text[:b]
        piece, stopped = checker.push(text[a:b])
        got += piece
        if stopped:
            break
    if not stopped:
        got += checker.flush()
    hits = [seen.find(stop) for stop in stops if stop in seen]
    assert (stopped is not None) == bool(hits)
    assert got == (seen[: min(hits)] if hits else text)
    if stopped is not None:
        assert stopped in stops
        assert seen.startswith(got + stopped)


@given(st.text("ab,", max_size=20), st.sampled_from(["ab", ", ", "aab", "b,b"]))
def test_stop_checker_releases_no_character_of_a_stop_string(text, stop):
    checker = StopChecker([stop])
    out = ""
    for character in text:
        piece, stopped = checker.push(character)
        out += piece
        if stopped:
            break
    assert stop not in out


def test_stop_checker_releases_held_text_when_the_match_fails():
    checker = StopChecker(["\n\nEND"])
    assert checker.push("one\n") == ("one", None)
    assert checker.push("two\n\n") == ("\ntwo", None)
    assert checker.push("EN") == ("", None)
    assert checker.push("X") == ("\n\nENX", None)
    assert checker.push("\n") == ("", None)
    assert checker.flush() == "\n"


@pytest.mark.parametrize("tokens", [["1, 2,", " 3, 4", ", ", "5, 6"], list("1, 2, 3, 4, 5, 6"), ["1, 2, 3, 4, 5, 6"]])
def test_detokenizer_excludes_a_stop_string_that_spans_tokens(tokens):
    out = ""
    detokenizer: Any = Detokenizer(cast("Any", "".join), [", 5"])
    for token in tokens:
        piece, stopped = detokenizer.push(token)
        out += piece
        if stopped:
            break
    assert out == "1, 2, 3, 4"


def test_detokenizer_drops_a_character_that_never_completes():
    detokenizer: Any = Detokenizer(decode_bytes)
    pieces = [detokenizer.push(token)[0] for token in (b"a", b"\xf0", b"\x9f")]
    assert "".join(pieces) + detokenizer.flush() == "a"
