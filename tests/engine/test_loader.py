"""What loading refuses, and what it chooses: device, number format, threads, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import load, tiny_llama

from serve.engine import device
from serve.errors import ModelLoadError


def test_cache_that_does_not_fit_says_how_much_it_needs(tmp_path):
    with pytest.raises(ModelLoadError, match=r"the KV cache does not fit: 1024 slots x 100000000 tokens"):
        load(tiny_llama(tmp_path), slots=1024, max_model_len=100_000_000)


def test_weights_that_are_not_finite_are_refused_at_warm_up(tmp_path):
    from transformers import LlamaForCausalLM

    folder = tiny_llama(tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[5, 5] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ModelLoadError, match=r"not finite in torch\.float32"):
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
