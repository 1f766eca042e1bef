"""The load-time proof: what runs exactly is served, what would be silently wrong is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import load, tiny_llama

from serve.engine import device
from serve.errors import ModelLoadError


def save(folder, family: str, **config):
    import transformers

    torch.manual_seed(0)
    base = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    made = getattr(transformers, f"{family}Config")(**{**base, **config})
    getattr(transformers, f"{family}ForCausalLM")(made).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Olmo2", "Phi3"])
def test_llama_type_families_pass_the_probe(tmp_path, family):
    loaded = load(save(tmp_path, family), slots=2)
    assert loaded.max_model_len == 256


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("Mamba", {"state_size": 8}, "recurrent|layers"),
        ("Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16}, "sliding_attention|softcap"),
        ("Mistral", {"sliding_window": 8}, "sliding|SERVE_MAX_MODEL_LEN=8"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    ],
)
def test_architecture_that_would_be_wrong_is_refused_with_the_reason(tmp_path, family, config, reason):
    with pytest.raises(ModelLoadError, match=reason):
        load(save(tmp_path, family, **config), slots=2)


def test_dynamic_rope_is_refused_with_the_length_that_is_exact(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    folder = tiny_llama(tmp_path, rope_parameters=rope)
    with pytest.raises(ModelLoadError, match="SERVE_MAX_MODEL_LEN=64"):
        load(folder)


def test_cache_that_does_not_fit_says_how_much_it_needs(tmp_path):
    with pytest.raises(ModelLoadError, match=r"the KV cache does not fit: 1024 slots x 100000000 tokens"):
        load(tiny_llama(tmp_path), slots=1024, max_model_len=100_000_000)


def test_weights_that_are_not_finite_are_refused_at_warm_up(tmp_path):
    from transformers import LlamaForCausalLM

    folder = tiny_llama(tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[5, 5] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ModelLoadError, match=r"finite|off by nan"):
        load(folder)


def test_cuda_that_is_not_there_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match="SERVE_DEVICE=auto"):
        device.choose_device("cuda")
    choice = device.choose_device("auto")
    assert (choice.value.type, bool(choice.reason)) == ("cpu", True)


def test_gpu_that_this_torch_cannot_use_is_never_replaced_by_the_cpu_in_silence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path)  # exists
    with pytest.raises(ModelLoadError, match=r"CUDA 13.0.*SERVE_DEVICE=cpu"):
        device.choose_device("auto")
    assert device.choose_device("cpu").value.type == "cpu"
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path / "none")
    assert device.choose_device("auto").value.type == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_mean_the_cpu(monkeypatch, tmp_path, hidden):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    choice = device.choose_device("auto")
    assert (choice.value.type, choice.reason) == ("cpu", "CUDA_VISIBLE_DEVICES hides the GPUs")


def test_cache_takes_no_memory_before_it_is_written():
    from serve.engine.kv_cache import KVCache

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    cache = KVCache(8, 4096, torch.float32, torch.device("cpu"))
    before = resident_bytes()
    key, _ = cache.layer(0, torch.zeros(1, 4, 64), torch.zeros(1, 4, 64))  # 2 x 32 MiB
    key[3, :2] = 1.0
    assert float(key.sum()) == 2 * 4 * 64  # reads every page
    assert resident_bytes() - before < 8 * 2**20


def test_dtype_is_chosen_by_the_device_and_says_why(monkeypatch):
    cpu = torch.device("cpu")
    for has_bfloat16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda value=has_bfloat16: value)
        choice = device.choose_dtype("auto", cpu, "bfloat16")
        assert choice.value is dtype
        assert "bfloat16" in choice.reason
    assert device.choose_dtype("float16", cpu, None).value is torch.float16


def test_threads_follow_the_containers_quota(monkeypatch):
    monkeypatch.setattr(device.cgroup, "cpus", lambda: 0.5)
    assert device.choose_threads(None).value == 1
    monkeypatch.setattr(device.cgroup, "cpus", lambda: None)
    assert device.choose_threads(None).value >= 1
    assert device.choose_threads(7).value == 7
