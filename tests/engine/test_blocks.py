"""Attention on the CPU against its definition, sequence by sequence in float32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serve.engine import attention, kv_cache, parts
from serve.engine.kv_cache import KVCache
from serve.engine.patterns import FULL, Kind, Pattern
from serve.engine.sequence import Chunk

CPU = torch.device("cpu")
PATTERNS = (FULL, Pattern(Kind.SLIDING, 150), Pattern(Kind.CHUNKED, 140))
EXTRAS: tuple[dict[str, Any], ...] = ({}, {"softcap": 2.0}, {"sinks": True}, {"scaling": 0.3})
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 6e-2}


class Step:
    """Decodes of some lengths and chunks ``(start, count)`` over one layer of a cache, whose other slots hold NaN."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, int, int, int], pattern: Pattern = FULL) -> None:
        self.num_heads, self.num_kv_heads, self.key_dim, self.value_dim = shape
        self.dtype, self.pattern = dtype, pattern
        self.generator = torch.Generator().manual_seed(3)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def run(self, lengths: Sequence[int], chunks: Sequence[tuple[int, int]], **extras: Any) -> float:
        """The largest difference from what each query should get alone."""
        num_slots = len(lengths) + len(chunks) + 1
        ends = [*lengths, *(start + count for start, count in chunks)]
        self.cache = cache = KVCache(num_slots, max(ends) + 7, self.dtype, CPU, (self.pattern,))
        cache.has_extras = bool({"softcap", "sinks"} & extras.keys())
        own = [(self.random(end, self.num_kv_heads, self.key_dim), self._values(end)) for end in ends]
        tensors = cache.layer(0, own[0][0], own[0][1])
        for slot, (pair, end) in enumerate(zip(own, ends, strict=True)):
            cache.extend(slot, 0, end)
            places = cache.rows([slot] * end, range(end))
            for tensor, new in zip(tensors, pair, strict=True):
                kv_cache.write(tensor, places, new)
        for tensor in tensors:
            for view in cache.tokens(tensor, num_slots - 1, 0, cache.max_len):
                view.fill_(float("nan"))
        batch: Any = SimpleNamespace(
            decodes=[SimpleNamespace(slot=slot, num_computed_tokens=end - 1) for slot, end in enumerate(lengths)],
            chunks=[
                Chunk(SimpleNamespace(slot=len(lengths) + number), start, count)  # type: ignore[arg-type]
                for number, (start, count) in enumerate(chunks)
            ],
        )
        # What the step writes is taken out first: it must come back.
        spans = [(end - 1, end) for end in lengths] + [(start, start + count) for start, count in chunks]
        new = [torch.cat([pair[part][slice(*span)] for pair, span in zip(own, spans, strict=True)]) for part in (0, 1)]
        query = self.random(len(new[0]), self.num_heads, self.key_dim)
        sinks = torch.linspace(-1, 2, self.num_heads).to(self.dtype) if extras.pop("sinks", False) else None
        context = attention.make_context(batch, cache, self.dtype, CPU)
        layer: Any = SimpleNamespace(layer_idx=0)
        with attention.running(context):
            packed = [each.transpose(0, 1)[None] for each in (query, *new)]
            got, _ = attention.slot_attention(layer, packed[0], packed[1], packed[2], None, s_aux=sinks, **extras)
        assert got.shape == (1, len(query), self.num_heads, self.value_dim)
        expected, begin = list[Tensor](), 0
        for pair, span in zip(own, spans, strict=True):
            size = span[1] - span[0]
            expected.append(self._plain(query[begin : begin + size], pair, range(*span), sinks, **extras))
            begin += size
        return float((got[0].float() - torch.cat(expected)).abs().max())

    def _values(self, count: int) -> Tensor:
        return self.random(count, self.num_kv_heads, self.value_dim)

    def _plain(
        self,
        query: Tensor,
        pair: tuple[Tensor, Tensor],
        span: range,
        sinks: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        keys, values = (each[: span.stop].float().repeat_interleave(groups, 1).transpose(0, 1) for each in pair)
        scores = query.float().transpose(0, 1) @ keys.transpose(1, 2)
        scores = scores * (self.key_dim**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = self.pattern.visible(torch.tensor(span), torch.arange(span.stop))
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, len(query), 1)), 2)
        weights = scores.softmax(2)[:, :, : span.stop]
        return (weights @ values).transpose(0, 1)


@pytest.fixture(params=["blocks", "tokens"])
def layout(request, monkeypatch) -> str:
    """As on a CPU, and as on a GPU without FlashAttention."""
    monkeypatch.setattr(kv_cache, "in_blocks", lambda *_: request.param == "blocks")
    return request.param


STEPS = (
    ([1], []),
    ([700], []),
    ([129, 128, 127], []),
    ([3, 300, 17, 128, 129, 256, 40, 9, 280], []),
    ([], [(0, 5)]),
    ([], [(0, 200), (0, 64), (130, 1)]),
    ([260, 30], [(250, 70), (0, 17)]),
)


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
