"""Steps over one layer of a cache, and what each query should get by attention's definition, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from serve.engine import attention, kv_cache
from serve.engine.compiled import Library
from serve.engine.kv_cache import KVCache
from serve.engine.patterns import FULL, Kind, Pattern
from serve.engine.sequence import Chunk

CPU = torch.device("cpu")
PATTERNS = (FULL, Pattern(Kind.SLIDING, 150), Pattern(Kind.CHUNKED, 140))
EXTRAS: tuple[dict[str, Any], ...] = ({}, {"softcap": 2.0}, {"sinks": True}, {"scaling": 0.3})
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 6e-2}

STEPS = (
    ([1], []),
    ([700], []),
    ([129, 128, 127], []),
    ([3, 300, 17, 128, 129, 256, 40, 9, 280], []),
    ([], [(0, 5)]),
    ([], [(0, 200), (0, 64), (130, 1)]),
    ([260, 30], [(250, 70), (0, 17)]),
)


class Step:
    """Decodes of some lengths and chunks ``(start, count)`` over one layer of a cache, whose other slots hold NaN."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, int, int, int],
        pattern: Pattern = FULL,
        kernels: Library | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.key_dim, self.value_dim = shape
        self.dtype, self.pattern, self.kernels = dtype, pattern, kernels
        self.generator = torch.Generator().manual_seed(3)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def run(self, lengths: Sequence[int], chunks: Sequence[tuple[int, int]], **extras: Any) -> float:
        """The largest difference from what each query should get alone; ``self.got`` is what they got."""
        num_slots = len(lengths) + len(chunks) + 1
        ends = [*lengths, *(start + count for start, count in chunks)]
        self.cache = cache = KVCache(num_slots, max(ends) + 7, self.dtype, CPU, (self.pattern,), self.kernels)
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
        self.got = got[0]
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
