"""Norms, gates and rotary embeddings by the compiled kernels: torch's own bits, put into a recorded step."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import guarded
from hypothesis import given
from hypothesis import strategies as st
from tiny import collect, load, request, tiny_llama
from torch import Tensor, nn
from torch.nn import functional
from toy import graph_of, inputs, of_ids

from serve.engine import peephole, program
from serve.engine.compiled import Library
from serve.engine.rows import Rows
from serve.engine.sequence import Batch, Sequence
from serve.types import GenerationRequest, SamplingParams

BF16 = torch.bfloat16


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def test_norm_is_torchs_but_for_the_last_bit(library: Library) -> None:
    for shape in ((1, 1, 576), (1, 40, 37), (3, 5, 7, 128), (1, 0, 16)):
        x, weight = made(*shape), made(shape[-1], seed=1)
        got, expected = Rows(library).rms_norm(x, weight, 1e-5), plain_norm(x, weight, 1e-5)
        assert got.shape == expected.shape
        assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=0)
    turned = made(1, 9, 4, 32).transpose(1, 2)
    assert torch.equal(Rows(library).rms_norm(turned, made(32), 1e-5), plain_norm(turned, made(32), 1e-5))


def test_norm_with_one_weight_for_all_is_torchs(library: Library) -> None:
    x, weight = made(1, 3, 5000), guarded(made(1))
    got, expected = Rows(library).rms_norm(x, weight, 1e-5), plain_norm(x, weight, 1e-5)
    assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=0)


@given(rows=st.integers(1, 40), size=st.integers(1, 130), seed=st.integers(0, 5))
def test_gate_of_parts_of_one_row_is_torchs(library: Library, rows: int, size: int, seed: int) -> None:
    both = made(1, rows, 2 * size, seed=seed) * 4
    x, y = both[..., :size], both[..., size:]
    got, expected = Rows(library).silu_gate(x, y), functional.silu(x) * y
    assert got.is_contiguous()
    assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=1e-30)


def test_gate_of_other_shapes_is_torchs(library: Library) -> None:
    for x, y in ((made(3, 5, 8), made(3, 5, 8)), (made(2, 3, 8).transpose(0, 1), made(3, 2, 8)), (made(5, 8), made(8))):
        expected = functional.silu(x) * y
        assert torch.allclose(Rows(library).silu_gate(x, y).float(), expected.float(), rtol=2**-7, atol=1e-30)


def test_gate_keeps_what_is_no_number_and_what_is_far_from_zero(library: Library) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 300.0, -300.0, 0.0, -90.0, -3e38]], dtype=BF16)
    got, expected = Rows(library).silu_gate(x, torch.ones_like(x)), functional.silu(x)
    assert torch.allclose(got.float(), expected.float(), atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_rotation_has_torchs_bits(library: Library, size: int) -> None:
    for rows in (1, 7, 40):
        x = made(1, rows, 5, size).transpose(1, 2)
        cosines, sines = made(1, 1, rows, size, seed=1), made(1, 1, rows, size, seed=2)
        expected = peephole.rotated(x, cosines, sines)
        assert torch.equal(Rows(library).rotated(x, cosines, sines), expected)
        pair = Rows(library).rotated_pair(x, cosines, sines, (3, 2))
        assert all(torch.equal(a, b) for a, b in zip(pair, (expected[:, :3], expected[:, 3:]), strict=True))


def test_rows_have_the_same_bits_with_any_number_of_threads(library: Library, on_threads: Any) -> None:
    rows, x, angles = Rows(library), made(1, 500, 576), made(1, 1, 500, 64)
    for function in (
        lambda: rows.rms_norm(x, made(576), 1e-5),
        lambda: rows.silu_gate(x, x),
        lambda: rows.rotated(x.view(1, 500, 9, 64).transpose(1, 2), angles, angles),
    ):
        one, *others = on_threads(function)
        assert all(torch.equal(each, one) for each in others)


EMBEDDING, WEIGHT = made(6, 64), made(64, seed=1)


def layer(ids: Tensor) -> Tensor:
    """A norm, a rotation of two heads of 32 numbers, and a gate."""
    hidden = plain_norm(functional.embedding(ids, EMBEDDING), WEIGHT, 1e-5)
    turned = ids[..., None].float() * torch.cat((torch.arange(16), torch.arange(16))) / 9
    cosines, sines = turned.cos().to(BF16).unsqueeze(1), turned.sin().to(BF16).unsqueeze(1)
    x = hidden.view(1, -1, 2, 32).transpose(1, 2)
    x = x * cosines + torch.cat((-x[..., 16:], x[..., :16]), -1) * sines
    return nn.functional.silu(x) * (x + 1)


def names_and_run(library: Library | None, forward: Callable[[Tensor], Tensor]) -> tuple[Counter[str], Callable]:
    graph = peephole.simplified(graph_of(of_ids(forward)), Rows(library) if library else None)
    names = Counter(getattr(node.function, "__qualname__", "") for node in graph.nodes)
    return names, program.compiled(graph)


def test_recorded_step_uses_them(library: Library) -> None:
    names, run = names_and_run(library, layer)
    assert [names[f"Rows.{name}"] for name in ("rms_norm", "rotated", "silu_gate")] == [1, 1, 1]
    assert not names["silu"]
    for rows in (1, 2, 7, 19, 40):
        ids, wanted = inputs(rows, 1)
        with torch.inference_mode():
            got, expected = run(rows, 1, ids, wanted), layer(ids)
        assert torch.allclose(got.float(), expected.float(), rtol=2**-6, atol=2**-8), rows


def wider(ids: Tensor) -> Tensor:
    return layer(ids).float() * functional.silu(ids.float())[..., None]


def read_twice(ids: Tensor) -> Tensor:
    gate = functional.silu(layer(ids))
    return gate * layer(ids) + gate


@pytest.mark.parametrize("forward", [wider, read_twice])
def test_what_only_resembles_a_gate_stays_as_it_is(library: Library, forward: Callable[[Tensor], Tensor]) -> None:
    names, run = names_and_run(library, forward)
    assert names["silu"] == 1
    ids, wanted = inputs(7, 1)
    with torch.inference_mode():
        assert torch.allclose(run(7, 1, ids, wanted).float(), forward(ids).float(), rtol=2**-5, atol=2**-6)


def test_step_has_the_same_bits_in_every_batch(library: Library, tmp_path: Path) -> None:
    """What a request gets on the CPU does not depend on what others ask at the same time, to the last bit."""
    folder = tiny_llama(tmp_path, hidden_size=128, head_dim=32)
    runner = load(folder, slots=21, dtype="bfloat16", num_threads=1).runner
    if runner._device.value.type != "cpu":
        pytest.skip("the kernels are a CPU's; run this test without TRIMARAN_TEST_DEVICE")
    assert runner._program is not None
    assert runner._cache.kernels is library
    draw = random.Random(3)

    def decode(slot: int) -> Sequence:
        position = draw.randrange(1, 200)
        request = GenerationRequest(
            request_id=str(slot), prompt_token_ids=(1,) * position, params=SamplingParams(max_tokens=1)
        )
        return Sequence(request, slot, position, output_token_ids=[draw.randrange(300)])

    sequences = [decode(slot) for slot in range(21)]
    with torch.inference_mode():
        alone = runner._program.logits(Batch((), tuple(sequences[:1]), ()))
        for count in range(2, 22):
            assert torch.equal(runner._program.logits(Batch((), tuple(sequences[:count]), ()))[:1], alone), count


async def test_seeded_answer_in_bfloat16_is_equal_alone_and_in_any_batch(library: Library, tmp_path: Path) -> None:
    """Prompts in chunks beside other requests' tokens included: torch's kernels promise it in float32 alone."""
    loaded = load(tiny_llama(tmp_path, hidden_size=128, head_dim=32), chunk=16, slots=6, dtype="bfloat16")
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 300) for _ in range(length)] for length in (70, 5, 40, 1, 90, 33)]
    seeded = SamplingParams(max_tokens=40, temperature=1.2, seed=3, ignore_eos=True)
    async with loaded.running() as engine:
        alone = await collect(engine.submit(request(prompts[0], seeded)))
        for others in (1, 3, 5):
            params = SamplingParams(max_tokens=20, temperature=1.0)
            streams = [engine.submit(request(prompt, params)) for prompt in prompts[1 : others + 1]]
            answer = await collect(engine.submit(request(prompts[0], seeded)))
            await asyncio.gather(*map(collect, streams))
            assert answer.token_ids == alone.token_ids, others
