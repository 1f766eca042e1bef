"""`trimaran doctor` on damaged files and on settings that do not go together: always a finding, never a traceback."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from checkpoints import adapter_files, write
from doctoring import IMAGE, change, doctor, found, save_good


@pytest.fixture(scope="module")
def good(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_good(tmp_path_factory.mktemp("good") / "model", demo_model)


@pytest.fixture
def model(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to break, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(good, tmp_path / "model"))


def drop(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def loop(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


DAMAGE: dict[str, tuple[str, Any]] = {
    "configuration that is no JSON": ("unusable-model", lambda folder: (folder / "config.json").write_text("{a")),
    "configuration in another encoding": ("unusable-model", lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0")),
    "word for a number": ("unusable-model", lambda folder: change(folder, num_hidden_layers="three")),
    "no heads": ("unusable-model", lambda folder: change(folder, num_attention_heads=0)),
    "list for an object": ("unusable-model", lambda folder: change(folder, quantization_config=[1])),
    "configuration of another model": ("unusable-model", lambda folder: change(folder, intermediate_size=128)),
    "method that nobody knows": ("unusable-model", lambda f: change(f, quantization_config={"quant_method": "odd"})),
    "generation settings": ("unusable-model", lambda folder: (folder / "generation_config.json").write_text("no")),
    "weights without one tensor": ("unusable-model", lambda folder: drop(folder, "model.layers.0.mlp.up_proj.weight")),
    "empty weights": ("broken-weights", lambda folder: (folder / "model.safetensors").write_bytes(b"")),
    "endless header": (
        "broken-weights",
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60)),
    ),
    "link to itself": ("broken-weights", loop),
    "template in another encoding": ("no-tokenizer", lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe")),
    "template that is a number": ("no-tokenizer", lambda f: change(f, "tokenizer_config.json", chat_template=[5])),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_doctor_finds_damage(what: str, model: Path):
    name, damage = DAMAGE[what]
    damage(model)
    done = doctor(str(model))
    assert found(done) == [name]
    assert "Traceback" not in done.output


def test_doctor_tells_what_mends_a_folder_that_is_not_there(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    for missing in (tmp_path / "loop", tmp_path / "none"):
        done = doctor(str(missing))
        assert found(done) == ["unusable-model"]
        assert "name a folder that is there" in done.stdout


def test_doctor_says_which_check_failed(model: Path, monkeypatch: pytest.MonkeyPatch):
    from trimaran.doctor import model as checks

    def broken(situation: Any) -> Any:
        del situation
        raise AttributeError("what nobody thought of")

    monkeypatch.setattr(checks, "CHECKS", (broken, *checks.CHECKS))
    done = doctor(str(model))
    assert found(done) == ["check-failed"]
    assert "what nobody thought of" in done.stdout


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        (b"[serve]\nmax_qeue = 3\n", "rename it to max_queue"),
        (b"[runpod]\ngpus = 'x'\n", "rename it to gpu"),
        (b"[serve]\nhost = '\xff'\n", "trimaran init MODEL --force"),
        (b"[serve\n", "trimaran init MODEL --force"),
        (b'[runpod]\nmode = "htpp"\n', "correct that line"),
        (b'[runpod]\ndisk_gb = "big"\n', "correct that line"),
        (b'[render]\nplan = ["pro"]\n', "correct that line"),
    ],
)
def test_doctor_finds_a_broken_file_of_settings(text: bytes, mend: str, model: Path):
    Path("trimaran.toml").write_bytes(text)
    done = doctor(str(model), platform="modal")
    assert found(done) == ["wrong-setting"]
    assert mend in json.loads(done.stdout)[0]["mend"]


def test_doctor_reads_lists_as_the_deploy_does(model: Path):
    Path("trimaran.toml").write_text('[runpod]\ngpu = "ADA_24, AMPERE_48"\n')
    given = ("--image", IMAGE, "/models/in-the-image")
    assert found(doctor(*given, platform="runpod")) == ["no-credentials"]
    assert found(doctor(*given, "--gpu", "ADA_24,AMPERE_48", platform="runpod")) == ["no-credentials"]


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("several-gpus", {"SERVE_MODAL_GPU": "H100:2"}),
        ("no-credentials", {"MODAL_TOKEN_SECRET": "", "MODAL_CONFIG_PATH": "/nowhere"}),
        ("wrong-setting", {"SERVE_MODAL_MIN_CONTAINERS": "20"}),
        ("wrong-setting", {"SERVE_MODAL_PRIMITIVE": "webb"}),
        ("wrong-setting", {"SERVE_MODAL_PRIMITIVE": "server", "SERVE_MODAL_MIN_CONTAINERS": "0"}),
        ("wrong-setting", {"SERVE_MODAL_SNAPSHOT": "gpu", "SERVE_MODAL_GPU": ""}),
        ("wrong-setting", {"SERVE_MODAL_STARTUP_TIMEOUT": "soon"}),
        ("no-chat-template", {"SERVE_CHAT_TEMPLATE": "/nowhere"}),
        ("local-file", {"SERVE_API_KEYS": "", "SERVE_API_KEYS_FILE": "model/config.json"}),
    ],
)
def test_doctor_finds_what_the_deploy_to_modal_would_refuse(name: str, environment: dict[str, str], model: Path):
    assert found(doctor(str(model), platform="modal", **environment)) == [name]


def test_keys_of_an_issuer_are_keys(model: Path):
    issuer = {"SERVE_API_KEYS": "", "SERVE_OIDC_ISSUER": "https://issuer.example"}
    assert found(doctor(str(model), platform="modal", **issuer)) == []
    given = ("/models/x", "--image", IMAGE, "--mode", "http")
    assert "authorization-taken" in found(doctor(*given, platform="runpod", **issuer))


def test_doctor_finds_float32_that_does_not_fit(model: Path):
    change(model, num_hidden_layers=100, hidden_size=4096, intermediate_size=10240)
    as_stored = found(doctor(str(model), platform="modal", SERVE_MODAL_GPU="L40S"))
    assert "machine-too-small" not in as_stored
    assert "machine-too-small" in found(
        doctor(str(model), platform="modal", SERVE_MODAL_GPU="L40S", SERVE_DTYPE="float32")
    )


@pytest.mark.parametrize(
    ("tag", "moves"),
    [("cu128-latest", True), ("latest_gpu", True), ("CPU", True), ("0.1.0", False), ("runpod-2026-11-01", False)],
)
def test_tags_that_move_are_told_from_versions(tag: str, moves: bool):
    given = ("/models/x", "--image", f"localhost:5000/me/trimaran:{tag}")
    assert ("moving-tag" in found(doctor(*given, platform="render"))) == moves


def test_files_of_this_machine_are_not_in_a_container(model: Path):
    template = {"SERVE_CHAT_TEMPLATE": str(model / "tokenizer.json")}
    assert found(doctor("/models/x", "--image", IMAGE, platform="render", **template)) == ["local-file"]
    embedding = {"SERVE_EMBEDDING_MODEL": str(model)}
    assert found(doctor("/models/x", "--image", IMAGE, platform="render", **embedding)) == ["local-file"]


def test_packages_that_an_image_lacks_are_found(model: Path, good: Path, tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    adapter = write(tmp_path / "adapter", adapter_files(str(good)))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    right = {f"{prefix}.lora_A.weight": torch.zeros(2, 64), f"{prefix}.lora_B.weight": torch.zeros(64, 2)}
    save_file(right, adapter / "adapter_model.safetensors")
    where = (str(adapter), "--image", IMAGE, "--plan", "pro")
    assert found(doctor(*where, platform="render")) == ["missing-package", "local-folder"]
    assert found(doctor(*where, "--extras", "engine,lora", platform="render")) == ["local-folder"]
    change(model, quantization_config={"quant_method": "gptq"})
    assert found(doctor(str(model))) == ["missing-package"]
    assert found(doctor(str(model), platform="modal")) == [], "the deploy to Modal adds them to its image"
    change(model, quantization_config={"quant_method": "eetq"})
    assert "needs a GPU" in doctor(str(model), "--image", IMAGE, platform="render").stdout


def test_drain_is_mended_by_a_longer_delay():
    delay = ("/models/x", "--image", IMAGE, "--shutdown-delay", "10")
    done = doctor(*delay, platform="render", SERVE_DRAIN_TIMEOUT_S="60")
    assert found(done) == ["drain-cut"]
    assert "--shutdown-delay 70" in done.stdout
    assert "SERVE_DRAIN_TIMEOUT_S=290" in doctor(*delay, platform="render", SERVE_DRAIN_TIMEOUT_S="1000").stdout


@pytest.mark.parametrize("content", [b"\xff\xfe", b"services: [[1]]", b"- a", b"services: 5"])
def test_doctor_finds_a_blueprint_that_is_none(content: bytes, tmp_path: Path):
    path = tmp_path / "render.yaml"
    path.write_bytes(content)
    assert set(found(doctor("/models/x", "--blueprint", str(path), platform="render"))) == {"blueprint"}
