"""One broken deployment for each finding of `trimaran doctor`, and good ones that it has nothing to say about."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import adapter_files, write
from click.testing import CliRunner
from doctoring import ENVIRONMENT, IMAGE, INDEX, change, doctor, found, save_good
from fake_hub import serving_hub
from fake_runpod import KEY, serving_runpod_api
from safetensors.torch import save_file

from trimaran.cli import main


@pytest.fixture(scope="module")
def good(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_good(tmp_path_factory.mktemp("good") / "model", demo_model)


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def test_good_configurations_raise_no_alarm(good: Path):
    assert found(doctor(str(good), platform="modal")) == []
    assert found(doctor(str(good))) == []
    server = {"SERVE_ENGINE": "echo", "SERVE_MODAL_STARTUP_TIMEOUT": "600", "SERVE_DRAIN_TIMEOUT_S": "120"}
    assert found(doctor(platform="modal", **server)) == []
    delay = ("--image", IMAGE, "--shutdown-delay", "120")
    assert found(doctor(*delay, platform="render", SERVE_ENGINE="echo", SERVE_DRAIN_TIMEOUT_S="110")) == []
    assert found(doctor("/models/in-the-image", "--image", IMAGE, platform="render")) == []
    blueprint = ("--blueprint", str(Path(__file__).parents[2] / "deploy/render/render.yaml"))
    assert found(doctor(*blueprint, platform="render", SERVE_ENGINE="echo")) == []


def test_good_endpoint_raises_no_alarm_with_a_model_of_the_hub(good: Path, tmp_path: Path):
    with serving_hub() as hub, serving_runpod_api() as api:
        hub.publish("me/tiny", {path.name: path.read_bytes() for path in good.iterdir()})
        api.endpoints["ep0"] = {"id": "ep0", "name": "trimaran", "workers": {"min": 0, "max": 3}}
        environment = {"RUNPOD_API_URL": api.url, "RUNPOD_API_KEY": KEY}
        arguments = ("me/tiny", "--platform", "runpod", "--image", IMAGE)
        assert at_hub(hub.port, tmp_path, *arguments, **environment) == (0, [])
        hub.refusal = (403, "GatedRepo")
        assert at_hub(hub.port, tmp_path / "new", *arguments, **environment) == (1, ["gated-model"])
        api.endpoints["ep0"]["workers"]["max"] = 0
        idle = doctor("--image", IMAGE, platform="runpod", SERVE_ENGINE="echo", **environment)
        assert found(idle) == ["idle-endpoint"]


def at_hub(port: int, cache: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """In a process of its own, because the Hub's client reads its address at import."""
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1", **ENVIRONMENT[""]}
    command = [sys.executable, "-m", "trimaran.cli", "doctor", *arguments, "--json"]
    done = subprocess.run(command, env={**os.environ, **hub, **environment}, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, [finding["name"] for finding in json.loads(done.stdout)]


MODELS: dict[str, Any] = {
    "pickle-weights": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "broken-weights": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "gguf": lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf"),
    "remote-code": lambda folder: change(folder, model_type="odd", auto_map={"AutoModelForCausalLM": "odd.Odd"}),
    "unknown-architecture": lambda folder: change(folder, model_type="odd"),
    "no-chat-template": lambda folder: strip_template(folder, None),
    "unsafe-chat-template": lambda folder: strip_template(folder, "{{ ''.__class__.__mro__ }}"),
    "unusable-model": lambda folder: (folder / "config.json").unlink(),
}


def strip_template(folder: Path, source: str | None) -> None:
    for path in folder.glob("*.jinja"):
        path.unlink()
    change(folder, "tokenizer_config.json", chat_template=source)


@pytest.mark.parametrize("name", MODELS)
def test_doctor_finds_what_is_wrong_with_a_model(name: str, model: Path):
    MODELS[name](model)
    assert found(doctor(str(model))) == [name]


def test_doctor_finds_an_unreadable_file(model: Path, monkeypatch: pytest.MonkeyPatch):
    # The tests may run as root, who may read everything: the system's answer is replaced.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".safetensors" and access(path, mode))
    assert found(doctor(str(model))) == ["unreadable-file"]


def test_doctor_finds_an_adapter_of_another_base(model: Path, tmp_path: Path):
    import torch

    adapter = write(tmp_path / "adapter", adapter_files(str(model)))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    right = {f"{prefix}.lora_A.weight": torch.zeros(2, 64), f"{prefix}.lora_B.weight": torch.zeros(64, 2)}
    save_file(right, adapter / "adapter_model.safetensors")
    assert found(doctor(str(adapter))) == []
    save_file({f"{prefix}.lora_A.weight": torch.zeros(2, 128)}, adapter / "adapter_model.safetensors")
    assert found(doctor(str(adapter))) == ["lora-base-mismatch"]
    other = {f"{prefix.replace('layers.0', 'layers.9')}.lora_A.weight": torch.zeros(2, 64)}
    save_file(other, adapter / "adapter_model.safetensors")
    assert found(doctor(str(adapter))) == ["lora-base-mismatch"]


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("unknown-gpu", {"SERVE_MODAL_GPU": "H1OO"}),
        ("no-bfloat16", {"SERVE_MODAL_GPU": "T4"}),
        ("context-too-long", {"SERVE_MAX_MODEL_LEN": "300"}),
        ("no-keys", {"SERVE_API_KEYS": ""}),
        ("drain-cut", {"SERVE_DRAIN_TIMEOUT_S": "3600"}),
        ("startup-too-short", {"SERVE_MODAL_STARTUP_TIMEOUT": "30"}),
        ("no-credentials", {"MODAL_TOKEN_ID": "", "MODAL_CONFIG_PATH": "/nowhere"}),
        ("unknown-variable", {"SERVE_MAX_QEUE": "3"}),
        ("unknown-variable", {"SERVE_MODAL_GPUS": "L4"}),
        ("wrong-setting", {"SERVE_MAX_QUEUE": "many"}),
        ("batch-too-large", {"SERVE_MAX_BATCH_SIZE": "1024", "SERVE_MODAL_GPU": "T4", "SERVE_DTYPE": "float16"}),
    ],
)
def test_doctor_finds_what_is_wrong_at_modal(name: str, environment: dict[str, str], model: Path):
    if name == "batch-too-large":
        change(model, max_position_embeddings=2**20)
        environment = environment | {"SERVE_MAX_MODEL_LEN": str(2**20)}
    assert found(doctor(str(model), platform="modal", **environment)) == [name]


def test_doctor_accepts_float16_on_a_card_without_bfloat16(model: Path):
    assert found(doctor(str(model), platform="modal", SERVE_MODAL_GPU="T4", SERVE_DTYPE="float16")) == []


def test_doctor_finds_fp8_on_a_card_without_it(model: Path):
    change(model, quantization_config={"quant_method": "fp8"})
    assert found(doctor(str(model), platform="modal")) == []
    assert found(doctor(str(model), platform="modal", SERVE_MODAL_GPU="A100-80GB")) == ["no-fp8"]


def test_doctor_finds_a_context_and_a_model_beyond_the_card(model: Path):
    change(model, max_position_embeddings=2**30)
    long = doctor(str(model), platform="modal", SERVE_MAX_MODEL_LEN=str(2**28))
    assert found(long) == ["context-beyond-fit"]
    change(model, max_position_embeddings=2048, num_hidden_layers=80, hidden_size=8192, intermediate_size=28672)
    # Of other weights than these: that is a finding of its own.
    assert found(doctor(str(model), platform="modal")) == ["unusable-model", "machine-too-small"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("moving-tag", ["--image", "docker.io/me/trimaran:latest"]),
        ("moving-tag", ["--image", "docker.io/me/trimaran"]),
        ("driver-too-old", ["--min-cuda", "12.4"]),
        ("unknown-gpu", ["--gpu", "ADA_42"]),
    ],
)
def test_doctor_finds_what_is_wrong_with_an_endpoint(name: str, arguments: list[str]):
    image = [] if "--image" in arguments else ["--image", IMAGE]
    done = doctor(*arguments, *image, platform="runpod", SERVE_ENGINE="echo")
    assert sorted(found(done)) == sorted([name, "no-credentials"])


def test_doctor_finds_two_parties_that_want_the_same_header():
    done = doctor("--mode", "http", "--image", IMAGE, platform="runpod", SERVE_ENGINE="echo", SERVE_API_KEYS="sk-x")
    assert "authorization-taken" in found(done)


def test_doctor_finds_a_disk_and_a_folder_that_will_not_do(model: Path):
    done = doctor(str(model), "--image", IMAGE, "--disk-gb", "10", platform="runpod")
    assert found(done) == ["disk-too-small", "local-folder", "no-credentials"]


def test_doctor_finds_what_is_wrong_at_render(model: Path, tmp_path: Path):
    small = doctor(str(model), "--image", IMAGE, "--plan", "starter", platform="render")
    assert found(small) == ["machine-too-small", "local-folder"]
    echo = {"SERVE_ENGINE": "echo"}
    assert found(doctor("--image", IMAGE, "--plan", "standart", platform="render", **echo)) == ["unknown-plan"]
    cut = doctor("--image", IMAGE, "--shutdown-delay", "30", platform="render", SERVE_DRAIN_TIMEOUT_S="60", **echo)
    assert found(cut) == ["drain-cut"]
    nothing = doctor("--torch-index", INDEX + "cpu", platform="render", PATH=str(tmp_path), **echo)
    assert found(nothing) == ["missing-tool"]
    broken = tmp_path / "render.yaml"
    broken.write_text("services: [{type: web, name: chat, runtime: image, plan: standard}]")
    assert set(found(doctor("--blueprint", str(broken), platform="render", **echo))) == {"blueprint"}


def test_doctor_finds_nobody_at_the_hub_and_at_the_platform(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert at_hub(port, tmp_path, "me/tiny") == (1, ["hub-unreachable"])
    environment = {"RUNPOD_API_URL": f"http://127.0.0.1:{port}", "RUNPOD_API_KEY": KEY, "SERVE_ENGINE": "echo"}
    assert found(doctor("--image", IMAGE, platform="runpod", **environment)) == ["platform-unreachable"]


def test_doctor_finds_a_model_without_a_tokenizer(model: Path):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert found(doctor(str(model))) == ["no-tokenizer"]


def test_doctor_finds_an_adapter_of_another_base_at_the_hub(good: Path, tmp_path: Path):
    import torch

    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    config = adapter_files("me/base")["adapter_config.json"]
    with serving_hub() as hub:
        hub.publish("me/base", {path.name: path.read_bytes() for path in good.iterdir()})
        save_file({prefix: torch.zeros(2, 128)}, tmp_path / "adapter.safetensors")
        weights = (tmp_path / "adapter.safetensors").read_bytes()
        hub.publish("me/adapter", {"adapter_config.json": config, "adapter_model.safetensors": weights})
        assert at_hub(hub.port, tmp_path, "me/adapter") == (1, ["lora-base-mismatch"])


def test_doctor_speaks_plainly(model: Path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    done = CliRunner(env=ENVIRONMENT[""]).invoke(main, ["doctor", str(model)])
    assert done.exit_code == 1
    assert "pickle-weights: " in done.stdout
    assert "  why   Pickle files can run code" in done.stdout
    assert "  mend  Convert to safetensors: python -c" in done.stdout
    assert done.stderr == "1 findings\n"
