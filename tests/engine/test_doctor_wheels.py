"""`trimaran doctor` on torch, CUDA and drivers, here and in images."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from doctoring import IMAGE, INDEX, doctor, found

from serve import kernels


def smi(folder: Path, cuda: str) -> dict[str, str]:
    """An environment with an ``nvidia-smi`` of its own, of a driver for that CUDA."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: {cuda}     |'\n")
    tool.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SERVE_ENGINE": "echo"}


def test_doctor_compares_this_machines_driver_with_its_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = smi(tmp_path, "12.4")
    version, find_spec = tmp_path / "version.py", importlib.util.find_spec
    version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "torch" else find_spec(name))
    assert found(doctor(**old)) == ["torch-without-cuda"]
    assert found(doctor(**old, SERVE_DEVICE="cpu")) == []
    version.write_text("cuda: Optional[str] = '13.0'\n")
    done = doctor(**old)
    assert found(done) == ["driver-too-old"]
    assert "whl/cu124" in done.stdout
    assert found(doctor(platform="modal", **old)) == []
    for recent in ("13.0", "13.2"):
        assert found(doctor(**smi(tmp_path, recent))) == []
    version.write_text("cuda: Optional[str] = '12.8'\n")
    assert found(doctor(**smi(tmp_path, "12.4"))) == []
    assert found(doctor(**smi(tmp_path, "N/A"))) == []


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernels would be, on a machine that they are for."""
    path = tmp_path / "kernels.so"
    monkeypatch.setattr(kernels, "is_for_this_machine", lambda: True)
    monkeypatch.setattr(kernels, "missing_instructions", list)
    monkeypatch.setattr(kernels, "library", lambda: path)
    return path


def finds_kernels(folder: Path, cuda: str = "N/A", platform: str | None = None, **environment: str) -> bool:
    """Whether they are a finding; that ``folder`` is no model is another."""
    given = {**smi(folder, cuda), "SERVE_ENGINE": "transformers", "SERVE_DTYPE": "auto", **environment}
    return "kernels-not-compiled" in found(doctor(str(folder), platform=platform, **given))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("cuda", "environment", "is_found"),
    [
        ("N/A", {}, True),
        ("N/A", {"SERVE_DTYPE": "bfloat16"}, True),
        ("N/A", {"SERVE_DTYPE": "float32"}, False),
        ("N/A", {"SERVE_DEVICE": "cuda"}, False),
        ("N/A", {"SERVE_ENGINE": "echo"}, False),
        ("13.0", {}, False),
        ("13.0", {"SERVE_DEVICE": "cpu"}, True),
    ],
)
def test_doctor_finds_missing_kernels_where_the_cpu_would_compute_with_them(
    cuda: str, environment: dict[str, str], is_found: bool, tmp_path: Path
):
    assert finds_kernels(tmp_path, cuda, **environment) == is_found


def test_doctor_asks_for_kernels_on_this_machine_only_while_it_has_none(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert finds_kernels(tmp_path)
    assert not finds_kernels(tmp_path, platform="render")
    for name, answer in (("missing_instructions", ["avx512_bf16"]), ("is_for_this_machine", False)):
        with monkeypatch.context() as other:
            other.setattr(kernels, name, lambda answer=answer: answer)
            assert not finds_kernels(tmp_path)
    library.touch()
    assert not finds_kernels(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--min-cuda", "12.6", "--torch-index", INDEX + "cu126"], []),
        (["--min-cuda", "12.4", "--torch-index", INDEX + "cu126"], ["driver-too-old"]),
        (["--gpu", "BLACKWELL_180", "--torch-index", INDEX + "cu126"], ["torch-unfit-for-gpu"]),
        (["--gpu", "BLACKWELL_180", "--torch-index", INDEX + "cu128"], []),
        (["--gpu", "AMPERE_24", "--torch-index", INDEX + "cpu"], ["torch-unfit-for-gpu"]),
        (["--gpu", "AMPERE_24"], []),
    ],
)
def test_doctor_compares_the_images_torch_with_the_endpoint(arguments: list[str], wanted: list[str]):
    done = doctor(*arguments, "--image", IMAGE, platform="runpod", SERVE_ENGINE="echo")
    assert found(done) == [*wanted, "no-credentials"]


CPU_TORCH = "torch==2.13.0+cpu\n"


@pytest.mark.parametrize(
    ("files", "is_wrong"),
    [
        ({"Dockerfile": "FROM python\nARG TORCH_INDEX_URL=\n"}, True),
        ({"Dockerfile": f"FROM python\nARG TORCH_INDEX_URL={INDEX}cpu\n"}, False),
        ({"Dockerfile": "FROM python\nARG TORCH_INDEX_URL=\nARG EXTRAS=\n"}, False),
        ({"Dockerfile": "FROM nvidia/cuda:13.0-base\n"}, True),
        ({"Dockerfile": "FROM python\nRUN pip install \\\n  torch transformers\n"}, True),
        ({"Dockerfile": f"FROM python\nRUN pip install torch --index-url {INDEX}cpu\n"}, False),
        ({"Dockerfile": "RUN pip install -r needed.txt\n", "needed.txt": "torch==2.13.0\n"}, True),
        ({"Dockerfile": "RUN pip install -r needed.txt\n", "needed.txt": "nvidia-cublas==13.0\n" + CPU_TORCH}, True),
        ({"Dockerfile": "RUN pip install -r needed.txt\n", "needed.txt": CPU_TORCH}, False),
    ],
)
def test_doctor_finds_cuda_in_an_image_for_render(
    files: dict[str, str], is_wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "docker").write_text("")
    (tmp_path / "docker").chmod(0o755)
    done = doctor(platform="render", SERVE_ENGINE="echo", PATH=str(tmp_path))
    assert found(done) == ["cuda-wheels"] * is_wrong


def test_doctor_reads_the_build_arguments_of_a_blueprint(tmp_path: Path):
    text = (Path(__file__).parents[2] / "deploy/render/render.yaml").read_text()
    blueprint = tmp_path / "render.yaml"
    blueprint.write_text(text.replace("whl/cpu", "whl/cu130"))
    assert found(doctor("--blueprint", str(blueprint), platform="render", SERVE_ENGINE="echo")) == ["cuda-wheels"]
