"""Weights from the Hub: planned here, brought by Modal's builder in its real entry point, from a Hub on loopback."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import adapter_files, model_files
from fake_hub import NEW, OLD, Hub, serving_hub
from modal_local import Deployed, modal_deploy, volume_ids
from modal_proto import api_pb2 as pb

from trimaran.emulate.modal.control import SUCCESS
from trimaran.emulate.modal.service import Emulator


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """For the deploy, and for the builder that the emulator starts."""
    with serving_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield hub


@pytest.fixture
def account() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


def from_hub(account: Emulator, model: str, **environment: str) -> tuple[Deployed, str, int]:
    given = {"SERVE_ENGINE": "", "SERVE_MODEL": model, "HF_HUB_OFFLINE": "", **environment}
    done = modal_deploy(account, **given)
    output = done.stdout + done.stderr
    return Deployed(account, output), output, done.returncode


def volume(account: Emulator) -> Path:
    return account.store.volume(volume_ids(account)["trimaran-models"])


def all_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_model_of_the_hub_is_pinned_to_its_commit_and_brought_whole(hub, account):
    hub.publish("owner/Tiny-1B", {**model_files(), "README.md": b"no", "pytorch_model.bin": b"no"}, OLD)
    hub.publish("owner/Tiny-1B", {**model_files(), "README.md": b"no", "pytorch_model.bin": b"no"}, NEW)
    made, output, status = from_hub(account, "owner/Tiny-1B", SERVE_MODEL_REVISION=OLD, HF_TOKEN="hf_private")
    assert status == 0, output
    public = made.variables[1]
    assert public["SERVE_MODEL"] == f"/models/owner--Tiny-1B/{OLD}"
    assert public["SERVE_MODEL_NAME"] == "owner/Tiny-1B"
    assert public["HF_HUB_OFFLINE"] == "1"
    assert "SERVE_MODEL_REVISION" not in public
    names = {"config.json", "model.safetensors", "tokenizer.json"}
    assert all_files(volume(account)) == {f"owner--Tiny-1B/{OLD}/{name}" for name in names}
    assert "Bearer hf_private" in hub.credentials

    made, output, status = from_hub(account, "owner/Tiny-1B")
    assert status == 0, output
    assert made.variables[1]["SERVE_MODEL"] == f"/models/owner--Tiny-1B/{NEW}"
    assert {path.name for path in (volume(account) / "owner--Tiny-1B").iterdir()} == {OLD, NEW}


def test_download_that_fails_leaves_no_folder_and_fails_the_deploy(hub):
    class RefusedToTheBuilder(Emulator):
        async def build(self, image_id: str) -> pb.GenericResult:
            if self.images[image_id].build_function_id:
                hub.refusal = (403, "GatedRepo")
            return await super().build(image_id)

    hub.publish("owner/tiny", model_files())
    with RefusedToTheBuilder() as account:
        _, output, status = from_hub(account, "owner/tiny")
        assert status != 0
        assert "GatedRepoError" in output
        assert account.published is None
        assert not (volume(account) / "owner--tiny" / NEW).exists()


def test_adapter_of_the_hub_points_to_its_base_on_the_volume(hub, account):
    hub.publish("owner/base", model_files())
    hub.publish("owner/adapter", adapter_files("owner/base"))
    made, output, status = from_hub(account, "owner/adapter")
    assert status == 0, output
    target = made.variables[1]["SERVE_MODEL"].removeprefix("/models/")
    config = json.loads((volume(account) / target / "adapter_config.json").read_text())
    # The builder's own paths, translated: the emulator has no /models.
    assert config["base_model_name_or_path"].endswith(f"/owner--base/{NEW}")
    assert (volume(account) / "owner--base" / NEW / "model.safetensors").exists()


def test_model_that_is_gated_is_refused_before_anything_is_created(hub, account):
    hub.publish("owner/tiny", model_files())
    hub.refusal = (403, "GatedRepo")
    _, output, status = from_hub(account, "owner/tiny")
    assert status != 0
    assert "accept its licence" in " ".join(output.split())
    assert account.requests == []


class NothingIsBuilt(Emulator):
    """Where no Hub is, no weights can be brought."""

    async def build(self, image_id: str) -> pb.GenericResult:
        return SUCCESS


def test_hub_that_cannot_be_reached_leaves_a_guess_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with NothingIsBuilt() as account:
        made, output, status = from_hub(account, "Qwen/Qwen3-4B", SERVE_MODAL_GPU="L4")
        assert status == 0, output
        assert "8 GB (a guess)" in output
        assert "not pinned" in output
        assert made.function.checkpointing_enabled
        assert made.function.resources.memory_mb > 4096 + 8e9 / 2**20
        assert made.variables[1]["SERVE_MODEL"] == "/models/Qwen--Qwen3-4B/default"
        (built,) = [request.image.build_function for request in account.images.values() if request.build_function_id]
        arguments = pickle.loads(built.input.args)[0]  # noqa: S301 - made by this test
        assert arguments[:3] == (volume_ids(account)["trimaran-models"], "Qwen/Qwen3-4B", None)
        assert "*.safetensors" in arguments[3]


def test_large_model_gets_no_snapshot(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with NothingIsBuilt() as account:
        made, output, status = from_hub(account, "owner/Big-30B", SERVE_MODAL_GPU="H200")
        assert status == 0, output
        assert not made.function.checkpointing_enabled
        assert made.function.resources.milli_cpu == 8000
