"""What loading refuses, and what it chooses: device, number format, threads, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import load, tiny_llama

from serve.engine import device, loader
from serve.engine.base import EngineConfig, ModelFiles
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


@pytest.mark.parametrize("num_missing", [1, 3])
def test_checkpoint_that_lacks_weights_is_refused(num_missing, tmp_path):
    """transformers would fill them with random numbers, and say so in a line of its log."""
    from safetensors.torch import load_file, save_file

    folder = tiny_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for layer in range(num_missing):
        del weights[f"model.layers.{layer}.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    others = "" if num_missing == 1 else " and 2 others"
    with pytest.raises(ModelLoadError, match=rf"lacks weights .*layers\.0\.mlp\.up_proj\.weight{others}\."):
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
    monkeypatch.setattr(device, "DRIVER_VERSION", tmp_path / "version")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 2021\nGCC\n"
    )
    with pytest.raises(ModelLoadError, match=r"driver 470.57.02, .*CUDA 13.0.*SERVE_DEVICE=cpu"):
        device.choose_device("auto")
    assert device.choose_device("cpu").value.type == "cpu"
    monkeypatch.setattr(device, "NVIDIA_DRIVER", tmp_path / "none")
    assert device.choose_device("auto").value.type == "cpu"


@pytest.mark.parametrize(
    ("capability", "built_for", "is_usable"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((7, 0), ["sm_75", "sm_80", "compute_120"], False),
        ((12, 1), ["sm_80", "sm_120"], True),
        ((13, 0), ["sm_90", "compute_120"], True),
        ((10, 0), ["sm_90a", "sm_120"], False),
        ((10, 3), ["sm_90a", "sm_100f"], True),
        ((6, 1), [], True),
    ],
)
def test_gpu_needs_kernels_of_its_generation(capability, built_for, is_usable, monkeypatch):
    assert device.is_built_for(capability, built_for) is is_usable
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    if is_usable:
        assert device.choose_device("auto").value == torch.device("cuda", 0)
    else:
        with pytest.raises(ModelLoadError, match=f"Some GPU has compute capability {capability[0]}.{capability[1]}"):
            device.choose_device("auto")


def test_weights_that_do_not_fit_say_how_much_they_need(tmp_path, monkeypatch):
    folder = tiny_llama(tmp_path, vocab_size=1200, hidden_size=256)

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loader, "_read_model", exhausted)
    monkeypatch.setattr(loader, "GIB", 2**20)  # the file is small
    size = (folder / "model.safetensors").stat().st_size / 2**20
    with pytest.raises(ModelLoadError, match=f"take {size / 2:.1f} GiB in bfloat16.* with {size * 0.65:.1f} GiB"):
        load(folder, dtype="bfloat16")


def test_device_changes_the_format_of_mapped_weights(tmp_path):
    """What a GPU start does, on the CPU: read in the checkpoint's format, changed tensor by tensor."""
    folder = tiny_llama(tmp_path)
    files = ModelFiles(folder=folder, decode=str, eos_token_ids=frozenset(), max_model_len=64)
    config = EngineConfig(device="cpu")
    expected = loader._read_model(files, torch.bfloat16, config).state_dict()
    got = loader._cast(loader._read_model(files, torch.float32, config), torch.bfloat16, torch.device("cpu"))
    assert got.dtype is torch.bfloat16
    assert got.config.dtype is torch.bfloat16
    assert expected.keys() == got.state_dict().keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in got.state_dict().items())
    assert all(
        a.dtype == b.dtype
        for a, b in zip(got.buffers(), loader._read_model(files, torch.bfloat16, config).buffers(), strict=True)
    )


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
    for view in cache.tokens(key, 3, 0, 2):
        view.fill_(1.0)
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
