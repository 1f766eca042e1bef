"""Attention on the CPU against its definition, sequence by sequence in float32."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from attending import CPU, EXTRAS, PATTERNS, STEPS, TOLERANCE, Step
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine import kv_cache, parts
from serve.engine.kv_cache import KVCache
from serve.engine.patterns import FULL
from serve.engine.sequence import Chunk


@pytest.fixture(params=["blocks", "tokens"])
def layout(request, monkeypatch) -> str:
    """As on a CPU, and as on a GPU without FlashAttention."""
    monkeypatch.setattr(kv_cache, "in_blocks", lambda *_: request.param == "blocks")
    return request.param


@pytest.mark.parametrize("extras", EXTRAS, ids=lambda extras: "-".join(extras) or "plain")
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.kind.name)
def test_every_query_gets_what_attention_is_defined_to_be(layout, pattern, extras):
    for shape in ((6, 2, 16, 16), (3, 1, 8, 24), (4, 4, 16, 16)):
        for lengths, chunks in STEPS:
            off = Step(torch.float32, shape, pattern).run(lengths, chunks, **extras)
            assert off < TOLERANCE[torch.float32], (shape, lengths, chunks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_but_does_not_err(layout, dtype):
    for extras in EXTRAS:
        for lengths, chunks in STEPS[1:]:
            assert Step(dtype, (6, 2, 64, 64)).run(lengths, chunks, **extras) < TOLERANCE[dtype], (lengths, chunks)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 600), max_size=12),
    chunks=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 140)), max_size=2),
    pattern=st.sampled_from(PATTERNS),
    extras=st.sampled_from(EXTRAS),
)
def test_any_step_in_blocks_is_right(lengths, chunks, pattern, extras):
    if lengths or chunks:
        off = Step(torch.float32, (4, 2, 8, 8), pattern).run(lengths, chunks, **extras)
        assert off < TOLERANCE[torch.float32]


def test_a_long_sequence_is_not_computed_with_the_short_ones():
    short, long = (0, 1), (0, 47)
    assert parts.segments((short,) * 12 + (long,) + (short,) * 19) == ((0, 12), (12, 13), (13, 32))
    assert parts.segments((short, (0, 2), short, (0, 2))) == ((0, 4),), "a part of its own costs more"
    assert parts.segments(()) == ()


def test_segments_cover_all_and_no_product_has_more_slots_than_it_may():
    draw = random.Random(2)
    for count in (1, 5, 33, 80):
        spans = tuple((0, draw.choice((1, 1, 2, 3, 30))) for _ in range(count))
        found = parts.segments(spans)
        assert [slot for begin, end in found for slot in range(begin, end)] == list(range(count))
        assert max(end - begin for begin, end in found) <= parts.MOST_SLOTS


def test_shapes_of_products_are_few():
    """oneDNN keeps compiled code for each: a server that has seen every length must not have grown by much."""
    shapes: set[tuple[int, ...]] = set()
    cache = KVCache(40, 4096, torch.bfloat16, CPU, (FULL,))
    for count in range(1, 41):
        for length in range(1, 4097, 97):
            for part in parts.block_view(FULL, [length - 1] * count, (), cache, torch.bfloat16).parts:
                slots = part.last_slot - part.first_slot
                shapes |= {(slots, 0, piece[1]) for piece in part.pieces}
    for tokens in range(1, 513, 5):
        for start in (0, 100, 3000):
            chunk = Chunk(SimpleNamespace(slot=1), start, tokens)  # type: ignore[arg-type]
            for part in parts.block_view(FULL, (), (chunk,), cache, torch.bfloat16).parts:
                shapes |= {(1, part.num_rows, piece[1]) for piece in part.pieces}
    assert len(shapes) < 80


def test_places_that_a_cache_does_not_have_are_refused():
    cache = KVCache(2, 300, torch.float32, CPU, (FULL,))
    cache.extend(1, 0, 300)
    for slot, end in ((0, 301), (-1, 1), (2, 1)):
        with pytest.raises(IndexError):
            cache.extend(slot, end - 1, end)
