"""Attention by the compiled kernel against its definition, and the same bits whatever is computed beside it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attending import CPU, EXTRAS, PATTERNS, STEPS, TOLERANCE, Step
from families import BASE, GEMMA, MIXED
from guarded import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from serve.engine import gate, tiles
from serve.engine.compiled import Library
from serve.engine.kv_cache import KVCache
from serve.engine.patterns import FULL, Pattern
from serve.engine.sequence import Chunk
from serve.engine.verdicts import VerdictFile

BF16 = torch.bfloat16
SHAPES = ((6, 2, 64, 64), (3, 1, 32, 96), (4, 4, 128, 64))
"""Heads, key heads, dimensions of keys and of values."""


@pytest.mark.parametrize("extras", EXTRAS, ids=lambda extras: "-".join(extras) or "plain")
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.kind.name)
def test_every_query_gets_what_attention_is_defined_to_be(library: Library, pattern: Pattern, extras: Any) -> None:
    for shape in SHAPES:
        for lengths, chunks in STEPS:
            off = Step(BF16, shape, pattern, library).run(lengths, chunks, **extras)
            assert off < TOLERANCE[BF16] / 2, (shape, lengths, chunks)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 600), max_size=12),
    chunks=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 140)), max_size=2),
    pattern=st.sampled_from(PATTERNS),
    extras=st.sampled_from(EXTRAS),
)
def test_any_step_is_right(library: Library, lengths, chunks, pattern, extras) -> None:
    if lengths or chunks:
        off = Step(BF16, (4, 2, 32, 32), pattern, library).run(lengths, chunks, **extras)
        assert off < TOLERANCE[BF16] / 2


def attended(library: Library, positions: list[int], neighbours: list[int]) -> torch.Tensor:
    """What decodes at ``positions`` get, with ``neighbours`` after them."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(5, 8, 2, 128, 64, generator=generator).to(BF16) for _ in range(2))
    query, key, value = (torch.randn(8, heads, 64, generator=generator).to(BF16) for heads in (6, 2, 2))
    row = [each[: len(positions + neighbours)].transpose(0, 1)[None] for each in (query, key, value)]
    view = tiles.tile_view(library, FULL, positions + neighbours, ())
    out = tiles.attend(row[0], row[1], row[2], keys, values, view, tiles.Extras(None, None, None))
    return out[: len(positions)]


def test_a_decode_has_the_same_bits_in_every_batch(library: Library) -> None:
    alone = attended(library, [300, 17], [])
    assert torch.equal(attended(library, [300, 17], [500, 3, 128, 127]), alone)
    assert torch.equal(attended(library, [300], []), alone[:1])


def test_attention_has_the_same_bits_with_any_number_of_threads(library: Library, on_threads: Any) -> None:
    def run() -> torch.Tensor:
        step = Step(BF16, (6, 2, 64, 64), FULL, library)
        assert step.run([600] * 8, [(0, 200), (300, 100)]) < TOLERANCE[BF16] / 2
        return step.got

    one, *others = on_threads(run)
    assert all(torch.equal(each, one) for each in others)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.kind.name)
def test_columns_of_a_prompt_have_the_same_bits_in_every_chunk(library: Library, pattern: Pattern) -> None:
    def run(*chunks: tuple[int, int]) -> torch.Tensor:
        generator, parts = torch.Generator().manual_seed(2), list[torch.Tensor]()
        keys, values = (torch.zeros(3, 1, 2, 128, 64, dtype=BF16) for _ in range(2))
        row = [torch.randn(1, heads, 300, 64, generator=generator).to(BF16) for heads in (6, 2, 2)]
        for start, count in chunks:
            columns = [each[:, :, start : start + count] for each in row]
            positions = range(start, start + count)
            spans = torch.tensor([(pattern.first(position), position) for position in positions], dtype=torch.int32)
            tile = torch.tensor([(0, count, 0)], dtype=torch.int32)
            view = tiles.TileView(library, tile, spans, count)
            parts.append(tiles.attend(*columns, keys, values, view, tiles.Extras(None, None, None)))  # type: ignore[arg-type]
        return torch.cat(parts)

    assert torch.equal(run((0, 300)), run((0, 37), (37, 100), (137, 163)))


@pytest.mark.parametrize("score", [-300.0, -95.0, 1e4])
@pytest.mark.parametrize("first", [0, 130])
def test_scores_far_from_0_are_weighed_like_others(library: Library, first: int, score: float) -> None:
    """Also of the second column, which may see nothing of the tile's first block."""
    generator = torch.Generator().manual_seed(3)
    keys, values, query = (torch.randn(*size, 32, generator=generator).to(BF16) for size in ((256,), (256,), (1, 1, 2)))
    keys[:, 0], query[..., 0] = 1, score
    new = (each[[150, 151]][None, None] for each in (keys, values))
    spans = torch.tensor([(100, 150), (first, 151)], dtype=torch.int32)
    view = tiles.TileView(library, torch.tensor([(0, 2, 0)], dtype=torch.int32), spans, 2)
    cache = (each.view(2, 1, 1, 128, 32) for each in (keys, values))
    got = tiles.attend(query, *new, *cache, view, tiles.Extras(1.0, None, None))  # type: ignore[arg-type]
    weights = (query[0, 0, 1].double() @ keys[first:152].double().T).softmax(0)
    assert torch.allclose(got[1, 0].double(), weights @ values[first:152].double(), atol=TOLERANCE[BF16] / 2)


def test_keys_that_are_not_numbers_stay_with_their_sequence(library: Library) -> None:
    step = Step(BF16, (4, 2, 32, 32), FULL, library)
    off = step.run([200, 130, 7], [])
    assert off < TOLERANCE[BF16] / 2, "the last slot of its cache holds NaN"
    keys, values = step.cache.layer(0, torch.empty(1, 2, 32), torch.empty(1, 2, 32))
    keys[0, 1, :, 5] = float("nan")
    row = [torch.ones(1, heads, 3, 32, dtype=BF16) for heads in (4, 2, 2)]
    view = tiles.tile_view(library, FULL, [199, 129, 6], ())
    got = tiles.attend(row[0], row[1], row[2], keys, values, view, tiles.Extras(None, None, None))
    assert [bool(each.isnan().any()) for each in got] == [False, True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"query": torch.ones(1, 4, 2, 32)},
        {"query": torch.ones(1, 5, 2, 32, dtype=BF16)},
        {"query": torch.ones(1, 4, 3, 32, dtype=BF16), "key": torch.ones(1, 2, 3, 32, dtype=BF16)},
        {"key": torch.ones(1, 2, 2, 32)},
        {"key": torch.ones(1, 2, 2, 64, dtype=BF16)},
        {"key": torch.ones(1, 4, 2, 32, dtype=BF16), "value": torch.ones(1, 4, 2, 32, dtype=BF16)},
        {"value": torch.ones(1, 2, 1, 32, dtype=BF16)},
        {"keys": torch.zeros(1, 1, 2, 64, 32, dtype=BF16)},
        {"values": torch.zeros(1, 1, 2, 128, 16, dtype=BF16)},
    ],
    ids=lambda wrong: "-".join(f"{name}-{each.dtype}-{tuple(each.shape)}" for name, each in wrong.items()),
)
def test_tensors_that_do_not_fit_are_refused(library: Library, wrong: dict[str, torch.Tensor]) -> None:
    given = {"query": torch.ones(1, 4, 2, 32, dtype=BF16)}
    given |= {name: torch.ones(1, 2, 2, 32, dtype=BF16) for name in ("key", "value")}
    given |= {name: torch.zeros(1, 1, 2, 128, 32, dtype=BF16) for name in ("keys", "values")}
    tile, spans = (torch.tensor(rows, dtype=torch.int32) for rows in ([(0, 2, 0)], [(0, 0), (0, 1)]))
    view = tiles.TileView(library, tile, spans, 2)
    assert tiles.attend(**given, view=view, extras=tiles.Extras(None, None, torch.ones(4))).shape == (2, 4, 32)
    with pytest.raises(ValueError, match="do not fit"):
        tiles.attend(**given, view=view, extras=tiles.Extras(None, None, torch.ones(3)))
    with pytest.raises(ValueError, match="do not fit"):
        tiles.attend(**given | wrong, view=view, extras=tiles.Extras(None, None, None))


@pytest.mark.parametrize("chunk", [(0, 1), (100, 29), (128, 33)])
@pytest.mark.parametrize("shape", [(1, 1, 32, 64), (6, 2, 64, 32), (7, 1, 96, 96)])
def test_nothing_beyond_a_tensor_is_touched(
    library: Library, shape: tuple[int, ...], chunk: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_heads, num_kv_heads, dim, value_dim = shape
    sizes = ((num_heads, dim), (num_kv_heads, dim), (num_kv_heads, value_dim))
    row = [torch.randn(1, heads, chunk[1] + 1, size).to(BF16) for heads, size in sizes]
    blocks = -(-sum(chunk) // 128)
    cache = [torch.randn(blocks, 2, num_kv_heads, 128, size).to(BF16) for size in (dim, value_dim)]
    prompt: Any = Chunk(SimpleNamespace(slot=1), *chunk)  # type: ignore[arg-type]
    view = tiles.tile_view(library, FULL, [sum(chunk) - 1], [prompt])
    extras = tiles.Extras(None, None, torch.randn(num_heads))
    expected = tiles.attend(*row, *(each.clone() for each in cache), view, extras)  # type: ignore[arg-type]
    view = replace(view, tiles=guarded(view.tiles), spans=guarded(view.spans))
    monkeypatch.setattr(library, "scratch", lambda size: guarded(torch.empty(size, dtype=torch.uint8)))
    got = tiles.attend(*map(guarded, row), *map(guarded, cache), view, extras)  # type: ignore[arg-type]
    assert torch.equal(got, expected)


def test_each_thread_has_memory_of_its_own(library: Library) -> None:
    ours = library.scratch(4096)
    assert library.scratch(100) is ours
    with ThreadPoolExecutor(1) as threads:
        theirs = threads.submit(library.scratch, 4096).result()
    assert theirs.data_ptr() != ours.data_ptr()


FAMILIES = [
    ("Llama", {}),
    ("Gemma3", GEMMA),
    ("Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0}),
    ("GptOss", {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Mistral", {"sliding_window": 8, "num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("name", "config"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_families_are_right_in_batches_with_it(library: Library, name: str, config: Any, tmp_path: Path) -> None:
    import transformers

    known: Any = transformers
    suffix = "TextConfig" if name == "Gemma3" else "Config"
    made = getattr(known, name + suffix)(**{**BASE, "head_dim": 32, **config})
    torch.manual_seed(0)
    getattr(known, f"{name}ForCausalLM")(made).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16).eval()
    with torch.inference_mode():
        cache = gate.examine(model, VerdictFile(None, [tmp_path], []))
    assert cache.kernels is library


def test_kernel_is_chosen_for_shapes_and_formats_that_it_computes(library: Library) -> None:
    def cache(heads: int, dim: int, value_dim: int, dtype: torch.dtype = BF16) -> KVCache:
        found = KVCache(1, 8, dtype, CPU, (FULL,))
        found.layer(0, torch.empty(1, heads, dim), torch.empty(1, heads, value_dim))
        return found

    assert tiles.choose(cache(2, 64, 32), BF16, CPU) is library
    assert tiles.choose(cache(2, 48, 64), BF16, CPU) is None
    assert tiles.choose(cache(2, 64, 16), BF16, CPU) is None
    assert tiles.choose(cache(2, 64, 64, torch.float32), torch.float32, CPU) is None


def test_kernel_that_is_off_is_not_chosen(library: Library, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(tiles, "_trial", lambda *_: float("nan"))
    cache = KVCache(1, 8, BF16, CPU, (FULL,))
    cache.layer(0, torch.empty(1, 2, 64), torch.empty(1, 2, 64))
    assert tiles.choose(cache, BF16, CPU) is None
    assert "the compiled kernel is off by nan on this model's shapes" in caplog.text
