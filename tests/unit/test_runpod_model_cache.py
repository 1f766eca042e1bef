"""Which source of the weights a RunPod worker takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import model_files, write
from model_cache import CACHE, choose

MODEL, COMMIT = "owner/name", "a" * 40


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A whole model in RunPod's cache."""
    home = tmp_path / CACHE / "models--owner--name"
    folder = home / "snapshots" / COMMIT
    write(folder, model_files())
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    return folder


def chosen(volume: Path, **environment: str) -> dict[str, str]:
    environ = {"SERVE_MODEL": MODEL, **environment}
    choose(environ, volume)
    return {name: value for name, value in environ.items() if name != "SERVE_CACHE_DIR"}


@pytest.mark.parametrize("has_ref", [True, False])
def test_a_whole_copy_in_runpods_cache_is_taken(tmp_path: Path, snapshot: Path, has_ref: bool):
    if not has_ref:
        (snapshot.parents[1] / "refs" / "main").unlink()
    assert chosen(tmp_path) == {"SERVE_MODEL": str(snapshot), "SERVE_MODEL_NAME": MODEL}


def test_the_commit_that_was_asked_for_is_taken(tmp_path: Path, snapshot: Path):
    assert chosen(tmp_path, SERVE_MODEL_REVISION=COMMIT, SERVE_MODEL_NAME="mine") == {
        "SERVE_MODEL": str(snapshot),
        "SERVE_MODEL_NAME": "mine",
    }
    assert chosen(tmp_path, SERVE_MODEL_REVISION="b" * 40)["SERVE_MODEL"] == MODEL


def test_an_interrupted_download_is_never_used(tmp_path: Path, snapshot: Path):
    weights = next(snapshot.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    environ = chosen(tmp_path)
    assert environ["SERVE_MODEL"] == MODEL
    assert environ["HF_HUB_CACHE"] == str(tmp_path / CACHE)


def test_the_image_comes_before_the_volume(tmp_path: Path):
    assert "HF_HUB_CACHE" not in chosen(tmp_path, HF_HUB_OFFLINE="1", HF_HOME="/models/hf")
    assert chosen(tmp_path)["HF_HUB_CACHE"] == str(tmp_path / CACHE)


@pytest.mark.parametrize("model", [MODEL, "/models/mine"])
def test_what_a_worker_finds_out_stays_on_a_volume_for_the_next_one(tmp_path: Path, model: str):
    for given, volume, expected in (
        ({}, tmp_path, str(tmp_path / "trimaran")),
        ({"SERVE_CACHE_DIR": "/mine"}, tmp_path, "/mine"),
        ({}, tmp_path / "absent", None),
    ):
        environ = {"SERVE_MODEL": model, **given}
        choose(environ, volume)
        assert environ.get("SERVE_CACHE_DIR") == expected


def test_without_a_volume_the_hub_is_asked(tmp_path: Path):
    assert chosen(tmp_path / "absent") == {"SERVE_MODEL": MODEL}


@pytest.mark.parametrize("model", ["", "/models/mine", "name"])
def test_what_is_no_hub_id_is_left_alone(tmp_path: Path, snapshot: Path, model: str):
    assert chosen(tmp_path, SERVE_MODEL=model) == {"SERVE_MODEL": model}
