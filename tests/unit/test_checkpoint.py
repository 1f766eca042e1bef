"""What a checkpoint's configuration says, read without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import checkpoint
from serve.errors import ModelLoadError


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 3}, {1, 2}),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, {0}),
        ({}, {"eos_token_id": 3}, {3}),
        (None, {"eos_token_id": [3, 4]}, {3, 4}),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": 5}}, {5}),
        (None, {"eos_token_id": None}, set()),
        (None, {"eos_token_id": True}, set()),
        (None, {"eos_token_id": -1}, set()),
    ],
)
def test_eos_ids_come_from_the_generation_config_first(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: set[int]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert checkpoint.eos_token_ids(tmp_path, config) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": 131072, "rope_scaling": {"factor": 4.0}}, 131072),
        ({"max_position_embeddings": None, "n_positions": 2048}, 2048),
        ({"max_position_embeddings": -1}, None),
        ({}, None),
    ],
)
def test_context_length_under_its_different_names(config: dict[str, Any], expected: int | None) -> None:
    assert checkpoint.context_length(config) == expected
    assert checkpoint.longest_context(config) == expected


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 4096),
        ({"text_config": {"rope_scaling": {"rope_type": "dynamic", "factor": 1.5}}}, 3072),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": "4"}}, 2048),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": math.inf}}, 2048),
    ],
)
def test_only_dynamic_rope_reaches_beyond_the_models_own_context(rope: dict[str, Any], expected: int) -> None:
    config = {"max_position_embeddings": 2048, **rope}
    assert checkpoint.longest_context(config) == expected
    assert checkpoint.context_length(config) == 2048


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
        ),
        ({"do_sample": True, "top_k": 20}, {"top_k": 20}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": False, "top_k": 20}, {}),
        ({"top_k": 20}, {}),
        ({"temperature": 0.6, "top_p": 0, "top_k": -1, "min_p": "x"}, {"temperature": 0.6}),
        ({"temperature": float("nan"), "top_p": True}, {}),
        ({}, {}),
    ],
)
def test_default_sampling_is_what_the_authors_set(
    tmp_path: Path, generation: dict[str, Any], expected: dict[str, float]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert checkpoint.default_sampling(tmp_path) == expected


def test_default_sampling_without_a_generation_config_is_empty(tmp_path: Path) -> None:
    assert checkpoint.default_sampling(tmp_path) == {}


def test_broken_generation_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json is not valid JSON"):
        checkpoint.default_sampling(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["eos_token_id", "max_position_embeddings", "text_config", "temperature", "top_k"])


@given(st.dictionaries(fields, json_values))
def test_any_configuration_can_be_read(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert all(token >= 0 for token in checkpoint.eos_token_ids(folder, config))
    assert (checkpoint.context_length(config) or 1) > 0
    assert set(checkpoint.default_sampling(folder)) <= {"temperature", "top_p", "top_k", "min_p"}


@pytest.mark.parametrize(
    ("quantization", "device", "message"),
    [
        ({"quant_method": "gptq"}, "cpu", r"quantised with gptq, which needs gptqmodel.*pip install gptqmodel optimum"),
        ({"quant_method": "awq"}, "cuda", "needs gptqmodel.*pip install gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "cuda", "pip install bitsandbytes"),
        ({"load_in_8bit": True}, "cuda", "pip install bitsandbytes"),
        ({"quant_method": "fp8"}, "cuda", "pip install kernels"),
        ({"quant_method": "compressed-tensors"}, "cpu", "pip install compressed-tensors"),
        ({"quant_method": "aqlm"}, "cuda", r"pip install 'aqlm\[gpu,cpu\]'"),
        ({"quant_method": "quanto"}, "cpu", "pip install optimum-quanto"),
        ({"quant_method": "vptq"}, "cpu", "needs a GPU"),
        ({"quant_method": "modelopt"}, "cuda", "quantised with modelopt, which is not supported"),
        ({}, "cuda", None),
        (None, "cpu", None),
    ],
)
def test_quantisation_is_refused_with_the_package_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, quantization: dict[str, Any] | None, device: str, message: str | None
) -> None:
    def nothing_but_accelerate(module: str) -> object:
        return object() if module == "accelerate" else None

    monkeypatch.setattr("importlib.util.find_spec", nothing_but_accelerate)
    config = {"quantization_config": quantization}
    if message is None:
        checkpoint.check_quantization(config, device)
        return
    with pytest.raises(ModelLoadError, match=message) as refused:
        checkpoint.check_quantization(config, device)
    assert "checkpoint that it was quantised from" in str(refused.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quantisation_with_everything_installed_is_accepted(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object())
    checkpoint.check_quantization({"quantization_config": {"quant_method": "gptq"}}, device)
