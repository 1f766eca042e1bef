"""FlashAttention's spans and the buffers of CUDA graphs, on a CPU kernel of the same signature and demands."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import varlen
from families import FAMILIES, save
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Loaded, collect, generate_alone, load, request

from serve.engine import flash, graphs
from serve.engine.kv_cache import KVCache
from serve.engine.patterns import FULL, Kind, Pattern
from serve.types import SamplingParams

CPU = torch.device("cpu")
HOPPER = (9, 0)
SPANNED = ("Llama", "Qwen3", "Mistral", "Gemma3", "GPTNeoX", "GPT2")
NOT_SPANNED = {"Gemma2": "softcaps or sinks", "GptOss": "softcaps or sinks", "DeepseekV3": "differ in size"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


replays: list[int] = []
"""The batch sizes of the steps that were run again instead of computed anew."""


def model_folder(tmp_path_factory: Any, name: str) -> Any:
    family = next(family for family in FAMILIES if family.name == name)
    return save(tmp_path_factory.mktemp(name), family)


def spanned(cache: KVCache, dtype: torch.dtype, device: torch.device) -> Any:
    """What a GPU would choose, were its float32 bfloat16."""
    del dtype, device
    return varlen.varlen if flash.unfit(cache, torch.bfloat16, HOPPER) is None else None


@pytest.fixture(scope="module", params=SPANNED)
def loaded(request, tmp_path_factory) -> Loaded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "choose", spanned)
        return load(model_folder(tmp_path_factory, request.param), chunk=40, slots=5, num_threads=1)


def record(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Stands for a CUDA graph: the same function over the same buffers, its result always in the same place."""
    result = run().clone()

    def replay() -> None:
        replays.append(len(result))
        result.copy_(run())

    return replay, result


def test_kernel_on_the_cpu_takes_what_torchs_own_takes():
    assert varlen.same_names()
    assert flash.probe(varlen.varlen, 2, 16, torch.float32, CPU) < 1e-5
    assert flash.probe(varlen.varlen, 1, 8, torch.bfloat16, CPU) < flash.TOLERANCE


def test_probe_finds_a_kernel_that_is_wrong():
    """One that forgets the window, and one that reads another slot."""

    def without_window(*arguments: Any, **options: Any) -> torch.Tensor:
        return varlen.varlen(*arguments, **{**options, "window_size": (-1, -1)})

    def first_slot(*arguments: Any, **options: Any) -> torch.Tensor:
        query, key, value, begins, starts, *sizes = arguments
        return varlen.varlen(query, key, value, begins, torch.zeros_like(starts), *sizes, **options)

    for wrong in (without_window, first_slot):
        assert flash.probe(wrong, 2, 16, torch.float32, CPU) > 4 * flash.TOLERANCE


async def test_chunks_and_decodes_over_spans_equal_generate(loaded):
    """Through the engine, with and without recorded steps; more sequences than slots, and reused prefixes."""
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 300) for _ in range(size)] for size in (3, 60, 17, 90, 41, 8, 33)]
    prompts.append([*prompts[3][:70], 9, 8, 7])
    expected = [generate_alone(loaded, prompt, 12) for prompt in prompts]
    params = SamplingParams(max_tokens=12, temperature=0.0)
    with torch.inference_mode():
        recorded = graphs.DecodeGraphs(loaded.runner._model, loaded.runner._cache, record)
    assert recorded.sizes == [1, 2, 4, 5]
    for decode_graphs in (None, recorded):
        loaded.runner._graphs = decode_graphs
        varlen.calls.clear()
        replays.clear()
        async with loaded.running() as engine:
            streams = [engine.submit(request(prompt, params)) for prompt in prompts]
            answers = await asyncio.gather(*map(collect, streams))
        assert [answer.token_ids for answer in answers] == expected
        sizes = {count for count, most in varlen.calls if most == 1}
        assert sizes, "the kernel was not used"
        assert (len(replays) > 10) == (decode_graphs is not None)
    loaded.runner._graphs = None


def test_steps_are_recorded_at_buckets_alone(loaded):
    """Three sequences run in the graph of four, and nothing but these sizes."""
    model, cache = loaded.runner._model, loaded.runner._cache
    with torch.inference_mode():
        step = graphs.DecodeStep(4, model, cache)
        rows = [(7, 0, 2), (9, 0, 0), (11, 0, 4)]
        step.fill(rows)
        addresses = step._inputs.data_ptr()
        three = step.run()
        step.fill([*rows, (13, 0, 1)])
        four = step.run()
    assert step._inputs.data_ptr() == addresses
    assert torch.equal(three[3], three[0]), "what is left over repeats the first"
    assert torch.allclose(three[:3], four[:3], atol=1e-4)
    assert not torch.allclose(four[3], four[0], atol=1e-2)


def test_recording_that_gives_other_logits_is_not_used(loaded):
    def stale(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        return (lambda: None), torch.randn_like(run())

    with torch.inference_mode(), pytest.raises(RuntimeError, match="off by"):
        graphs.DecodeGraphs(loaded.runner._model, loaded.runner._cache, stale)


@pytest.mark.parametrize("name", NOT_SPANNED)
def test_models_with_more_than_plain_attention_keep_torchs_own(name, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(flash, "choose", spanned)
    cache = load(model_folder(tmp_path_factory, name), slots=2, num_threads=1).runner._cache
    assert cache.varlen is None
    assert NOT_SPANNED[name] in (flash.unfit(cache, torch.bfloat16, HOPPER) or "")


def test_what_the_hardware_lacks_is_said():
    cache = KVCache(1, 4, torch.float16, CPU, (FULL,))
    cache.layer(0, torch.zeros(1, 2, 64), torch.zeros(1, 2, 64))
    assert flash.unfit(cache, torch.float16, (8, 0)) is None
    assert "7.5" in (flash.unfit(cache, torch.float16, (7, 5)) or "")
    assert "float32" in (flash.unfit(cache, torch.float32, HOPPER) or "")
    chunked = KVCache(1, 4, torch.float16, CPU, (Pattern(Kind.CHUNKED, 8),))
    assert "chunks" in (flash.unfit(chunked, torch.float16, HOPPER) or "")
    chunked.patterns = (FULL,)
    chunked.layer(0, torch.zeros(1, 2, 320), torch.zeros(1, 2, 320))
    assert "320" in (flash.unfit(chunked, torch.float16, HOPPER) or "")
    assert flash.choose(cache, torch.float16, CPU) is None


@settings(max_examples=200)
@given(st.integers(1, 300))
def test_buckets_waste_less_than_half_and_hold_the_largest_batch(num_slots):
    sizes = graphs.buckets(num_slots)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == num_slots
    for count in range(1, num_slots + 1):
        chosen = next(size for size in sizes if size >= count)
        assert chosen < 2 * count
