"""What `trimaran plan` finds out without weights is what real models take."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import safetensors
from click.testing import CliRunner
from fake_hub import serving_hub
from families import FAMILIES, Family, save
from tiny import load, tiny_llama

from serve.cards import CARDS
from serve.engine.alone import CACHE_NAMES, num_bytes_below
from serve.errors import ConfigError
from trimaran.cli import main
from trimaran.plan.dry_run import DryRun, dry_run
from trimaran.plan.need import EXACT, FORMULA, examine

CONTEXT = 40
SHORT = ("--prompt", "100", "--out", "50")
"""What a tiny model has room for."""

CHOSEN = [
    "Llama (grouped-query attention)", "Llama4 (chunked attention, experts)", "Qwen3Moe (experts)",
    "Mistral (sliding window)", "Gemma3 (sliding window and RoPE by layer)",
    "GptOss (sinks, sliding window, experts)", "DeepseekV3 (MLA, experts)", "GPT2 (learned positions)",
    "GPTBigCode (one KV head, learned positions)", "OPT (learned positions)", "Bloom", "Mamba2", "Qwen3Next", "Jamba",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.id in CHOSEN], ids=lambda family: family.id)
def test_dry_run_takes_the_bytes_of_a_real_run(family: Family, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path, family)
    found = dry_run(folder, "float32", CONTEXT)
    assert isinstance(found, DryRun), found
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        out = model(input_ids=torch.ones(1, CONTEXT, dtype=torch.long), use_cache=True)
    cache = next(kept for name in CACHE_NAMES if (kept := out.get(name)) is not None)
    tensors = [*model.parameters(), *model.buffers()]
    assert found.weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.own_cache_bytes == num_bytes_below(cache)
    runner = load(folder, slots=2, num_threads=1).runner
    assert (found.reason == "") == (runner.alone_reason is None)
    if runner.alone_reason is None:
        kept = [tensor for layer in runner._cache._layers.values() for tensor in layer]
        assert found.kv_bytes_per_token * 2 * runner.max_model_len == sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize("name", ["Jamba", "Qwen3Next", "Mamba2"])
def test_long_context_of_a_recurrent_model_is_what_a_real_run_takes(name: str, tmp_path):
    """Its tokens are not run one by one."""
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path, next(family for family in FAMILIES if family.id == name), max_position_embeddings=1024)
    found = dry_run(folder, "float32", 200)
    assert isinstance(found, DryRun), found
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        out = model(input_ids=torch.ones(1, 200, dtype=torch.long), use_cache=True)
    cache = next(kept for kind in CACHE_NAMES if (kept := out.get(kind)) is not None)
    assert found.own_cache_bytes == num_bytes_below(cache)


def test_enough_families_are_compared():
    assert len([family for family in FAMILIES if family.id in CHOSEN]) == len(CHOSEN) >= 8


def test_need_of_the_real_model(demo_model):
    need = examine(str(demo_model), None, 1000)
    assert need.stored_bytes == need.weight_bytes - 256 == 269_030_016  # and RoPE's 32 frequencies, twice
    assert need.kv_bytes_per_sequence == need.own_cache_bytes == 23_040_000
    assert need.method == EXACT


def test_need_of_a_float32_checkpoint_is_half_of_its_bytes(tmp_path):
    need = examine(str(tiny_llama(tmp_path)), None, None)
    assert need.stored_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) - header(tmp_path)
    assert need.weight_bytes == pytest.approx(need.stored_bytes / 2, rel=0.01)


def header(folder: Path) -> int:
    raw = (folder / "model.safetensors").read_bytes()
    return 8 + struct.unpack("<Q", raw[:8])[0]


def test_context_beyond_the_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="256"):
        examine(str(tiny_llama(tmp_path)), None, 300)


def test_code_of_the_model_is_never_run(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    need = examine(str(folder), None, None)
    assert not (tmp_path / "ran").exists()
    assert need.method == FORMULA
    assert need.kv_bytes_per_token == 2 * 3 * 2 * 16 * 2
    assert "is not run" in need.notes[0]


def test_quantised_weights_count_as_they_are_stored(tmp_path):
    folder = tiny_llama(tmp_path)
    stored = examine(str(folder), None, None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    need = examine(str(folder), None, None)
    assert (need.quantization, need.weight_bytes) == ("fp8", stored.stored_bytes)
    assert need.weight_bytes_on(CARDS["NVIDIA L4"]) == need.weight_bytes
    unpacked = need.weight_bytes_on(CARDS["NVIDIA A100 40GB"])
    assert unpacked == max(need.weight_bytes, 2 * need.num_parameters)


def packed_fp8(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if "proj" not in name:
        return {name: tensor.to(torch.bfloat16)}
    return {name: tensor.to(torch.float8_e4m3fn), name.replace(".weight", ".weight_scale_inv"): torch.ones(1, 1)}


def packed_mxfp4(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if "experts" not in name or "bias" in name:
        return {name: tensor.to(torch.bfloat16)}
    experts, inner, outer = tensor.shape
    blocks = torch.zeros(experts, outer, inner // 32, 16, dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:3], 127, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("family", "changes", "method", "packed"),
    [
        ("Llama (grouped-query attention)", {}, "fp8", packed_fp8),
        ("GptOss (sinks, sliding window, experts)", {"intermediate_size": 64}, "mxfp4", packed_mxfp4),
    ],
)
def test_what_no_cpu_computes_in_is_unpacked_as_by_a_real_load(family, changes, method, packed, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path, next(one for one in FAMILIES if one.id == family), **changes)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored |= packed(name, tensor)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": method, "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    need = examine(str(folder), None, CONTEXT)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert need.weight_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert need.weight_bytes_on(None) == sum(tensor.nbytes for tensor in model.parameters()) > need.weight_bytes


def test_lora_adapter_is_planned_as_its_base(tmp_path):
    base = tiny_llama(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_bytes(safetensors({"lora_A": b"1" * 100}))
    need, alone = examine(str(adapter), None, None), examine(str(base), None, None)
    assert (need.weight_bytes, need.adapter_bytes) == (alone.weight_bytes, 100)
    assert "merged" in need.notes[-1]


def test_hub_is_asked_for_headers_only(tmp_path):
    folder = tiny_llama(tmp_path / "model", vocab_size=30_000)  # weights far beyond what a header takes
    (folder / "tokenizer.json").write_text("{}")
    cache = tmp_path / "cache"
    with serving_hub() as hub:  # the client reads its address at import: a process of its own
        hub.publish("me/tiny", {path.name: path.read_bytes() for path in folder.iterdir()})
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-m", "trimaran.cli", "plan", "me/tiny", "--json", *SHORT]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    local = examine(str(folder), None, None)
    found = json.loads(done.stdout)["model"]
    assert (found["weight_bytes"], found["stored_bytes"]) == (local.weight_bytes, local.stored_bytes)
    assert found["method"] == EXACT
    assert not list(cache.rglob("*.safetensors"))
    assert "bytes=0-262143" in hub.ranges


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_plan_sorts_all_platforms_by_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = str(tiny_llama(tmp_path / "model"))
    chart = tmp_path / "cost.svg"
    done = run(
        folder,
        "--json",
        "--load",
        "2/min",
        "--idle",
        "60",
        "--seconds",
        "8",
        "--cold-start",
        "40",
        "--chart",
        str(chart),
        *SHORT,
    )
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    priced = [offer for offer in shown["offers"] if offer["usd_per_month"] is not None]
    assert {offer["platform"] for offer in priced} == {"modal", "runpod", "render"}
    costs = [offer["usd_per_month"] for offer in priced]
    assert costs == sorted(costs)
    assert shown["load"]["requests_per_hour"] == 120
    assert {(offer["service_s"], offer["cold_s"]) for offer in priced} == {(8, 40)}
    assert "older than 60 days" in done.stderr
    assert "older than 60 days" in shown["warning"]
    assert chart.read_text().startswith("<?xml")


def test_plan_of_what_fits_nowhere_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = run(str(tiny_llama(tmp_path / "model")), "--platform", "render", "--concurrency", "100000000", *SHORT)
    assert done.exit_code == 1
    assert "fits on no machine" in done.stdout
    assert "render standard: needs" in done.stdout


@pytest.mark.parametrize("load", ["60", "0/h", "6/week", "-1/h"])
def test_plan_refuses_what_is_no_load(load):
    done = run("model", "--load", load)
    assert done.exit_code == 2
    assert "60/h" in done.stderr


def test_request_that_is_longer_than_the_context_is_refused(tmp_path):
    done = run(str(tiny_llama(tmp_path / "model")), "--prompt", "200", "--out", "100")
    assert done.exit_code == 2
    assert "200 + 100 tokens does not fit into a context of 256" in done.stderr


def test_model_of_the_settings_is_planned_as_the_server_would_take_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny_llama(tmp_path / "model")
    Path(".env").write_text("SERVE_MODEL=./model\nSERVE_MAX_MODEL_LEN=200\nSERVE_DTYPE=float32\n")
    done = run("--json", *SHORT)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["model"]
    assert (found["model"], found["context"], found["value_bytes"]) == ("./model", 200, 4)
    assert found["weight_bytes"] == found["stored_bytes"] + 2 * 8 * 4  # and RoPE's frequencies, twice
    assert "not UTF-8" in broken_dotenv().stderr


def broken_dotenv() -> Any:
    Path(".env").write_bytes(b"SERVE_MODEL=\xff\n")
    return run()


@pytest.mark.parametrize("changes", [{"text_config": "odd"}, {"num_attention_heads": -4}, {"vocab_size": "many"}])
def test_configuration_that_no_model_has_is_planned_by_what_is_left(changes, tmp_path):
    folder = tiny_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    need = examine(str(folder), None, None)
    assert need.method == FORMULA
    assert need.kv_bytes_per_token >= 0
    assert "cannot be built from its config.json" in need.notes[0]


def test_chart_of_another_kind_is_refused(tmp_path):
    done = run(str(tiny_llama(tmp_path / "model")), "--chart", str(tmp_path / "a.pdf"), *SHORT)
    assert done.exit_code == 2
    assert ".svg or .png" in done.stderr
