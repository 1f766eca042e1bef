"""Packed linear layers: the same numbers, or the model as it was."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from serve.engine import huge_pages, joint, linear
from serve.engine.device import available_ram

DTYPES = [torch.float32]
"""Those that oneDNN computes in on this CPU: without AVX-512 or AVX-NE-CONVERT only float32."""
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    DTYPES.append(torch.bfloat16)
if torch.ops.mkldnn._is_mkldnn_fp16_supported():
    DTYPES.append(torch.float16)


def test_packed_operators_exist_in_this_torch() -> None:
    """They are private: when a new torch drops them, this test says so, and the server only becomes slower."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert linear.is_usable(dtype) == (dtype in DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 576, 1536), (7, 33, 5), (17, 96, 5), (64, 96, 257), (130, 64, 32)]
)
def test_packed_linear_computes_what_linear_does(
    dtype: torch.dtype, bias: bool, rows: int, inputs: int, outputs: int
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    x = torch.randn(1, rows, inputs).to(dtype)
    with torch.inference_mode():
        expected, got = plain(x).float(), linear.PackedLinear(plain.weight, plain.bias)(x).float()
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=1e-5 if dtype is torch.float32 else 0.03, rtol=0.02)


def test_packed_linear_takes_batches_of_rows() -> None:
    plain, x = nn.Linear(24, 40), torch.randn(3, 7, 24)
    with torch.inference_mode():
        assert torch.allclose(linear.PackedLinear(plain.weight, plain.bias)(x), plain(x), atol=1e-5)


def test_packed_linear_is_compiled_for_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code of every number of rows stays in memory: half a MiB each, for each shape of a weight."""
    computed: set[int] = set()
    apply = linear._apply

    def count(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        computed.add(x.numel() // x.shape[-1])
        return apply(x, *rest)

    monkeypatch.setattr(linear, "_apply", count)
    layer = linear.PackedLinear(torch.ones(8, 8), None)
    with torch.inference_mode():
        for num_rows in range(1, 545):
            assert layer(torch.ones(1, num_rows, 8)).shape == (1, num_rows, 8)
    assert len(computed) <= 72
    assert computed >= set(range(1, 17)), "decode steps are not padded"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path)).eval()


def test_pack_leaves_the_logits_of_a_model(model: Any) -> None:
    token_ids = torch.arange(5, 40)[None]
    with torch.inference_mode():
        expected = model(input_ids=token_ids).logits
        num_packed = linear.pack(model)
        got = model(input_ids=token_ids).logits
    assert num_packed == model.config.num_hidden_layers * 7 + 1
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_pages_keep_every_bit_of_what_is_computed(dtype: torch.dtype) -> None:
    layer = linear.PackedLinear(torch.randn(2048, 1024).to(dtype), None)
    x = torch.randn(3, 1024).to(dtype)
    with torch.inference_mode():
        before = layer(x)
        assert huge_pages.promote(available_ram())
        assert torch.equal(layer(x), before)


def test_pack_starts_huge_pages_for_what_it_packed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(huge_pages, "start", started.append)
    size = sum(module.weight.nbytes for module in model.modules() if type(module) is nn.Linear)
    with torch.inference_mode():
        linear.pack(model)
        assert started == [size]
        linear.pack(model)
    assert started == [size], "nothing was left to pack"


def test_pack_joins_layers_that_get_the_same_input(model: Any) -> None:
    with torch.inference_mode():
        linear.pack(model)
    joined = [name for name, module in model.named_modules() if isinstance(module, joint.JointLinear)]
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"] * model.config.num_hidden_layers
    assert [name.rpartition(".")[2] for name in joined] == names


def test_joint_parts_are_computed_once_and_then_forgotten() -> None:
    computed: list[int] = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        computed.append(len(x))
        return torch.cat([x, 2 * x], -1)

    both, x = joint.Joint(compute, [3, 3]), torch.ones(2, 3)
    last_use = weakref.ref(x)
    assert torch.equal(both.take(1, x), 2 * x)
    assert torch.equal(both.take(0, x), x)
    assert computed == [2]
    del x
    assert last_use() is None


def test_joint_parts_follow_the_tensor_that_each_is_given() -> None:
    """Neighbours in the trial need not be neighbours in every step."""
    both, one, other = joint.Joint(lambda x: torch.cat([x, 2 * x], -1), [3, 3]), torch.ones(1, 3), torch.zeros(1, 3)
    assert [both.take(0, each).sum().item() for each in (one, one, other, one)] == [3, 3, 0, 3]
    assert [both.take(1, each).sum().item() for each in (other, one)] == [0, 6]


def test_neighbours_are_those_that_can_be_one_matrix() -> None:
    a, b, biased, twice, elsewhere = (nn.Linear(4, size, bias=size == 3) for size in (1, 2, 3, 5, 6))
    x, y = torch.ones(1, 4), torch.zeros(1, 4)

    def trial() -> None:
        for layer, given in ((a, x), (b, x), (biased, x), (twice, y), (elsewhere, y), (twice, x)):
            layer(given)

    assert joint.neighbours(trial, [a, b, biased, twice, elsewhere]) == [[a, b]]
    assert not any(layer._forward_pre_hooks for layer in (a, b, biased, twice, elsewhere))


def _no_operators(*_: Any) -> Any:
    raise AttributeError("no such operator")


def _wrong_numbers(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.flip(0).contiguous(), 8)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_reorder", _no_operators, "no packed operators"),
        ("available_ram", lambda: 2**16, "would leave too little"),
        ("PACKABLE", frozenset(), "none that can be packed"),
    ],
)
def test_pack_leaves_the_model_alone_where_it_cannot(
    name: str, value: Any, reason: str, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    monkeypatch.setattr(linear, name, value)
    with torch.inference_mode():
        assert linear.pack(model) == 0
    assert [module for module in model.modules() if type(module) is nn.Linear] == layers
    assert reason in caplog.text


def test_pack_is_undone_where_the_logits_differ(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    monkeypatch.setattr(linear, "is_usable", lambda dtype: True)
    monkeypatch.setattr(linear, "_reorder", _wrong_numbers)
    with torch.inference_mode():
        assert linear.pack(model) == 0
    assert [module for module in model.modules() if type(module) is nn.Linear] == layers
    assert "off by" in caplog.text
