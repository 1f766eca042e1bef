"""Which files, variables and packages a deploy plans for a platform's volume."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
from checkpoints import adapter_files, model_files, write

from serve import placement
from serve.errors import ModelLoadError
from serve.settings import Settings

ROOT = Path(__file__).parents[2]
POOLING = {"modules.json": b"[]", "1_Pooling/config.json": b"{}", "sentence_bert_config.json": b"{}"}


def settings(**values: object) -> Settings:
    return Settings(_env_file=None, **values)  # pyright: ignore[reportArgumentType, reportCallIssue]


def embedding_folder(tmp_path: Path) -> Path:
    (tmp_path / "my-embedder/1_Pooling").mkdir(parents=True)
    return write(tmp_path / "my-embedder", {**model_files(), **POOLING, "README.md": b"no"})


def test_placement_brings_both_models_under_their_own_names(tmp_path):
    model = write(tmp_path / "my-model", model_files())
    plan = placement.place(
        settings(model=str(model), embedding_model=str(embedding_folder(tmp_path))), "/models", "cuda"
    )
    chat, embedder = plan.parts
    assert re.fullmatch(r"/models/my-model-[0-9a-f]{12}", chat.target)
    assert re.fullmatch(r"/models/my-embedder-[0-9a-f]{12}", embedder.target)
    assert set(POOLING) < set(embedder.names)
    assert "README.md" not in embedder.names
    assert plan.variables == {
        "SERVE_MODEL": chat.target,
        "SERVE_MODEL_NAME": "my-model",
        "SERVE_EMBEDDING_MODEL": embedder.target,
        "SERVE_EMBEDDING_MODEL_NAME": "my-embedder",
        "HF_HUB_OFFLINE": "1",
    }
    assert plan.num_bytes == sum(
        (folder / "model.safetensors").stat().st_size for folder in (model, tmp_path / "my-embedder")
    )
    with placement.staged(embedder) as staged:
        assert (staged / "1_Pooling/config.json").read_bytes() == b"{}"


def test_placement_of_an_engine_without_a_model_still_brings_the_embedding_model(tmp_path):
    plan = placement.place(settings(engine="echo", embedding_model=str(embedding_folder(tmp_path))), "/m", "cpu")
    assert len(plan.parts) == 1
    assert "SERVE_MODEL" not in plan.variables
    assert placement.place(settings(engine="echo"), "/m", "cpu").variables == {}


def test_placement_needs_no_transformers(tmp_path, monkeypatch):
    folder = write(tmp_path / "my-model", model_files())
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert placement.place(settings(model=str(folder)), "/models", "cpu").parts


def quantized(tmp_path: Path, method: str) -> Path:
    config = json.loads(model_files()["config.json"]) | {"quantization_config": {"quant_method": method}}
    return write(tmp_path / method, {**model_files(), "config.json": json.dumps(config).encode()})


def test_placement_names_the_packages_of_a_quantised_model(tmp_path):
    fp8 = settings(model=str(quantized(tmp_path, "fp8")))
    assert placement.place(fp8, "/models", "cuda").packages == ("accelerate", "kernels")
    assert placement.place(fp8, "/models", "cpu").packages == ("accelerate",)
    with pytest.raises(ModelLoadError, match="needs a GPU"):
        placement.place(settings(model=str(quantized(tmp_path, "vptq"))), "/models", "cpu")
    with pytest.raises(ModelLoadError, match="not supported here"):
        placement.place(settings(model=str(quantized(tmp_path, "magic"))), "/models", "cuda")


def test_placement_names_the_packages_of_adapters_and_records(tmp_path):
    base = write(tmp_path / "base", model_files())
    adapter = write(tmp_path / "adapter", adapter_files(str(base)))
    plan = placement.place(settings(model=str(adapter), records_url="sqlite:////tmp/x.db"), "/models", "cpu")
    assert plan.packages == (*placement.LORA_PACKAGES, *placement.RECORDS_PACKAGES)


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> set[str]:
    return {plain(name) for name in re.findall(r"^([\w.-]+)==", (ROOT / file).read_text(), re.MULTILINE)}


@pytest.mark.parametrize(
    ("packages", "roots"),
    [
        (placement.LORA_PACKAGES, {"peft"}),
        (placement.RECORDS_PACKAGES, {"aiosqlite", "alembic", "asyncpg"}),
        (placement.OIDC_PACKAGES, {"pyjwt", "cryptography"}),
        (placement.TRACES_PACKAGES, {"opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"}),
    ],
)
def test_packages_beyond_the_lock_are_complete_and_pinned(packages, roots):
    from packaging.requirements import Requirement

    given = {plain(name) for name in packages}
    assert roots <= given <= pins("requirements-dev.lock")
    for name in given:
        for text in importlib.metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert plain(needed.name) in given | pins("requirements.lock"), f"{name} needs {needed.name}"


def test_everything_that_the_server_imports_is_in_the_image():
    owners = importlib.metadata.packages_distributions()
    extras = (placement.LORA_PACKAGES, placement.RECORDS_PACKAGES, placement.OIDC_PACKAGES, placement.TRACES_PACKAGES)
    optional = {plain(name) for names in extras for name in names}
    for file in (ROOT / "serve").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                named = [node.module or ""]
            for name in {text.partition(".")[0] for text in named} - sys.stdlib_module_names - {"serve"}:
                from_ = {plain(owner) for owner in owners.get(name, ())}
                assert from_ & (pins("requirements.lock") | optional), f"{file.name} imports {name}"
