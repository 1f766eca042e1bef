"""What the Dockerfile says, without building it; tests/image builds and runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from checkpoints import model_files
from fake_hub import NEW, Hub, serving_hub

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_dockerfile_passes_hadolint() -> None:
    done = subprocess.run(
        ["hadolint", "--format", "json", "--failure-threshold", "style", str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert json.loads(done.stdout) == []
    assert done.returncode == 0


def test_dockerfile_states_the_projects_version() -> None:
    assert f"ARG VERSION={PROJECT['version']}\n" in DOCKERFILE


def test_dockerfile_keeps_to_what_older_builders_accept() -> None:
    for word in ("<<", "--link", "--parents", "--exclude", "--checksum", "RUN --network", "# syntax"):
        assert word not in DOCKERFILE.replace("no COPY --link", ""), word
    assert not re.search(r"type=secret[^ ]*,env=", DOCKERFILE)


def test_dockerfile_ends_with_the_stage_that_serves() -> None:
    stages = re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)
    assert stages == ["kernels", "app", "runpod", "serve"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, False),
        ({"TORCH_INDEX_URL": "https://download.pytorch.org/whl/cpu"}, True),
        ({"TORCH_INDEX_URL": "https://mirror.example/whl/cpu/"}, True),
        ({"TORCH_INDEX_URL": "https://download.pytorch.org/whl/cu130"}, False),
        ({"KERNELS": "1"}, True),
        ({"KERNELS": "1", "TORCH_INDEX_URL": "https://download.pytorch.org/whl/cu130"}, True),
        ({"KERNELS": "1", "TORCH_INDEX_URL": "https://download.pytorch.org/whl/cpu", "EXTRAS": ""}, False),
    ],
)
def test_only_images_for_cpus_wait_for_a_compiler(arguments: dict[str, str], wanted: bool, tmp_path: Path) -> None:
    stage = DOCKERFILE[DOCKERFILE.index(" AS kernels") : DOCKERFILE.index(" AS app")]
    found = re.search(r"^RUN (case .+ esac;)", stage, re.MULTILINE)
    assert found
    defaults = dict(re.findall(r"^ARG (\w+)=(.*)$", stage, re.MULTILINE))
    done = subprocess.run(["sh", "-c", f"{found[1]} echo installs"], cwd=tmp_path, env=defaults | arguments, stdout=-1)
    assert (done.returncode, done.stdout) == (0, b"installs\n" * wanted)
    assert (tmp_path / "wanted").exists() == wanted


def test_weights_layer_has_just_the_files_that_baking_imports() -> None:
    """One more would bring weights anew whenever it changes; one less breaks the build."""
    copied = re.search(r"^COPY (serve/__init__\.py .+) serve/$", DOCKERFILE, re.MULTILINE)
    assert copied
    needed, todo = {"serve/__init__.py"}, ["serve/bake.py"]
    while todo:
        path = todo.pop()
        needed.add(path)
        found = re.findall(r"^ *from serve(?:\.(\w+)| import (\w+))", (ROOT / path).read_text(), re.MULTILINE)
        todo += [name for pair in found if (name := f"serve/{pair[0] or pair[1]}.py") not in needed]
    assert set(copied[1].split()) == needed


def test_baked_model_is_compared_once_its_code_is_there_and_below_the_weights_place() -> None:
    """In the stage that both images grow from; with the cache that the weights layer filled."""
    code, compared = DOCKERFILE.index("COPY serve serve"), DOCKERFILE.index("python -m serve.compare")
    assert code < compared < DOCKERFILE.index(" AS runpod")
    step = DOCKERFILE[DOCKERFILE.rindex("\nRUN", 0, compared) : compared]
    assert 'if [ -n "${MODEL_ID}" ]' in step
    assert "HF_HOME=/models/hf HF_HUB_OFFLINE=1" in step
    assert 'SERVE_MODEL="${MODEL_ID}" SERVE_MODEL_REVISION="${MODEL_REVISION}"' in step


def test_image_requirements_are_the_projects() -> None:
    spec = importlib.util.spec_from_file_location("requirements", ROOT / "deploy" / "image" / "requirements.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    optional = PROJECT["optional-dependencies"]

    assert module.requirements(PROJECT, []) == PROJECT["dependencies"]
    assert set(module.requirements(PROJECT, ["lora"])) == {
        *PROJECT["dependencies"],
        *optional["engine"],
        *(line for line in optional["lora"] if not line.startswith("trimaran")),
    }
    with pytest.raises(SystemExit, match="EXTRAS names 'gpu'"):
        module.requirements(PROJECT, ["gpu"])


def bake(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "serve.bake", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_bake_brings_a_whole_model_or_fails_with_the_reason(tmp_path: Path) -> None:
    with serving_hub() as hub:
        hub.publish("owner/tiny", model_files())
        done = bake(hub, tmp_path, "owner/tiny", "")
        assert done.returncode == 0, done.stderr
        assert f"revision {NEW}" in done.stderr
        assert [path.name for path in tmp_path.rglob("snapshots/*")] == [NEW]

        done = bake(hub, tmp_path, "owner/none")
        assert (done.returncode, "owner/none was not found" in done.stderr) == (1, True)
    assert bake(hub, tmp_path).returncode == 2
