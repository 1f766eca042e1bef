"""Linear layers by the compiled kernel: torch's numbers, and the same bits in every batch."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from torch.nn import functional
from transformers import AutoModelForCausalLM

from serve import kernels
from serve.engine import compiled, linear
from serve.engine.compiled import CompiledLinear, Library

BF16 = torch.bfloat16


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    pairs=st.integers(1, 90),
    outputs=st.integers(1, 200),
    has_bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_linear_computes_what_torch_does(library: Library, rows, pairs, outputs, has_bias, seed) -> None:
    x, weight = made(rows, 2 * pairs, seed=seed), made(outputs, 2 * pairs, seed=seed + 1)
    bias = made(outputs, seed=seed + 2) if has_bias else None
    expected = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    with torch.inference_mode():
        got = CompiledLinear(library, weight, bias)(x)
    assert got.dtype == BF16
    assert got.shape == expected.shape
    # Exact but for the order of float32's sums, and rounded once.
    assert torch.allclose(got.float(), expected, rtol=2**-8, atol=1e-3)


def test_linear_gives_a_row_the_same_bits_in_every_batch(library: Library) -> None:
    layer, x = CompiledLinear(library, made(200, 96), made(200)), made(70, 96, seed=5)
    with torch.inference_mode():
        whole = layer(x)
        for begin, end in ((0, 1), (69, 70), (3, 10), (1, 70), (30, 62)):
            assert torch.equal(layer(x[begin:end]), whole[begin:end])


@pytest.mark.parametrize("rows", [1, 9, 70])
def test_linear_has_the_same_bits_with_any_number_of_threads(library: Library, on_threads: Any, rows: int) -> None:
    layer, x = CompiledLinear(library, made(1000, 1024), made(1000)), made(rows, 1024, seed=5)
    one, *others = on_threads(lambda: layer.compute(x))
    assert all(torch.equal(each, one) for each in others)


def test_linear_takes_rows_in_any_shape_and_any_place(library: Library) -> None:
    layer, x = CompiledLinear(library, made(40, 24), None), made(3, 2 * 24, 7)
    with torch.inference_mode():
        assert torch.equal(layer(x[:, ::2].transpose(1, 2)), layer(x[:, ::2].transpose(1, 2).contiguous()))
        assert layer(made(2, 3, 4, 24)).shape == (2, 3, 4, 40)
        assert layer(made(1, 0, 24)).shape == (1, 0, 40)


def test_rows_that_are_not_numbers_harm_no_others(library: Library) -> None:
    layer, x = CompiledLinear(library, made(40, 24), None), made(9, 24)
    with torch.inference_mode():
        before = layer(x)
        x[4] = float("nan")
        after = layer(x)
    assert bool(after[4].isnan().all())
    kept = [row for row in range(9) if row != 4]
    assert torch.equal(after[kept], before[kept])


@pytest.mark.parametrize(("outputs", "features"), [(1, 2), (15, 30), (17, 34), (64, 64), (65, 62), (200, 98)])
def test_nothing_beyond_a_matrix_is_touched(library: Library, outputs: int, features: int) -> None:
    weight, bias = guarded(made(outputs, features)), guarded(made(outputs))
    panels = guarded(torch.empty(library.linear_packed_size(features, outputs), dtype=BF16))
    library.linear_pack(weight.data_ptr(), features, outputs, panels.data_ptr())
    for rows in (1, 6, 7):
        x, out = guarded(made(rows, features)), guarded(torch.empty(rows, outputs, dtype=BF16))
        pointers = (panels.data_ptr(), bias.data_ptr(), out.data_ptr(), None)
        library.linear(x.data_ptr(), features, rows, features, outputs, *pointers, 1)
        assert torch.equal(out, compiled.linear(library, x, panels, bias, weight.shape))


def test_linear_refuses_what_it_would_read_wrongly(library: Library) -> None:
    layer = CompiledLinear(library, made(40, 24), None)
    with pytest.raises(TypeError, match="float32"), torch.inference_mode():
        layer(torch.ones(2, 24))
    for run in (layer, layer.compute):
        with pytest.raises(ValueError, match="24 features, not in 26"), torch.inference_mode():
            run(made(2, 26))
    assert compiled.can_pack(made(4, 8), made(4))
    assert not compiled.can_pack(made(4, 7), None), "pairs along an odd number of features"
    assert not compiled.can_pack(made(4, 0), None)
    assert not compiled.can_pack(torch.ones(4, 8), None)
    for bias in (torch.ones(4), made(3), made(1).expand(4), made(8)[::2]):
        assert not compiled.can_pack(made(4, 8), bias)


def test_operator_and_direct_call_give_the_same(library: Library) -> None:
    layer, x = CompiledLinear(library, made(40, 24), made(40)), made(1, 5, 24)
    with torch.inference_mode():
        assert torch.equal(layer(x), layer.compute(x))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path), dtype=BF16).eval()


def test_pack_takes_the_compiled_kernel(library: Library, model: Any) -> None:
    token_ids = torch.arange(5, 40)[None]
    with torch.inference_mode():
        expected = model(input_ids=token_ids).logits
        assert linear.pack(model) == model.config.num_hidden_layers * 7 + 1
        got = model(input_ids=token_ids).logits
    assert isinstance(model.lm_head, CompiledLinear)
    assert not any(isinstance(module, linear.PackedLinear) for module in model.modules())
    assert torch.allclose(got.float(), expected.float(), atol=0.1 * float(expected.std()))


def test_pack_takes_a_model_that_widens_its_logits(
    library: Library, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """How far they may be off is a matter of the numbers that the model computes with."""
    caplog.set_level("INFO")
    monkeypatch.setattr(linear, "off_by", lambda *_: 0.1)
    model.register_forward_hook(lambda _model, _given, output: setattr(output, "logits", output.logits.float()))
    with torch.inference_mode():
        assert linear.pack(model), caplog.text
    assert isinstance(model.lm_head, CompiledLinear)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_trial", lambda _: 0.3, "they are off by 0.3 here"),
        ("_trial", lambda _: float("nan"), "they are off by nan here"),
        ("Library", lambda *_: (_ for _ in ()).throw(OSError("undefined symbol")), "undefined symbol"),
    ],
)
def test_kernels_that_do_not_prove_right_are_left_alone(
    library: Library, model: Any, name: str, value: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(compiled, name, value)
    monkeypatch.setattr(compiled, "library", compiled.library.__wrapped__)
    assert compiled.library() is None
    assert f"Kernels: torch's ({reason})" in caplog.text
    with torch.inference_mode():
        linear.pack(model)
    assert not any(isinstance(module, CompiledLinear) for module in model.modules())


def test_sources_compile_without_a_warning(library: Library, tmp_path: Path) -> None:
    sources = [str(path) for path in kernels.sources() if path.suffix == ".c"]
    command = [
        "cc",
        *kernels.FLAGS.split(),
        "-Wall",
        "-Wextra",
        "-Werror",
        *sources,
        "-o",
        str(tmp_path / "kernels.so"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
