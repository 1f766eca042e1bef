"""A model in a folder: what is accepted, and that every refusal names the thing and the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import adapter_files, model_files, safetensors, sharded_files, write
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ConfigError, ModelLoadError
from serve.weight_files import verify_file
from serve.weights import fetch_weights, locate, needed_files

ROOT = Path(__file__).parents[2]


def load(path: Path | str) -> None:
    fetch_weights(locate(str(path)))


@pytest.mark.parametrize("files", [model_files(), sharded_files()], ids=["single", "sharded"])
def test_folder_is_accepted_with_its_size(tmp_path: Path, files: dict[str, bytes]) -> None:
    source = fetch_weights(locate(str(write(tmp_path, files))))
    assert (source.folder, source.origin, source.revision, source.adapter) == (tmp_path, "local", None, None)
    assert source.tokenizer_folder == tmp_path
    assert source.config["model_type"] == "llama"
    assert source.num_bytes == sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))


def test_folder_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "name", model_files())
    assert locate("owner/name").origin == "local"


def test_single_file_is_read_where_there_is_an_index_too(tmp_path: Path) -> None:
    assert locate(str(write(tmp_path, sharded_files() | model_files()))).weight_files == ("model.safetensors",)


def test_configured_weights_file_is_read(tmp_path: Path) -> None:
    files = model_files(transformers_weights="other.safetensors")
    files["other.safetensors"] = files.pop("model.safetensors")
    assert fetch_weights(locate(str(write(tmp_path, files)))).weight_files == ("other.safetensors",)


def without(name: str) -> dict[str, bytes]:
    return {key: data for key, data in model_files().items() if key != name}


NO_WEIGHTS = without("model.safetensors")
REFUSALS = {
    "no config": (without("config.json"), r"has no config\.json"),
    "cache folder": ({"snapshots": b""}, "name the folder below snapshots/"),
    "config not JSON": (model_files() | {"config.json": b"{"}, r"config\.json is not valid JSON"),
    "config not an object": (model_files() | {"config.json": b"[]"}, "does not hold a JSON object"),
    "no weights": (NO_WEIGHTS, "has no weights: model.safetensors"),
    "pickle": (NO_WEIGHTS | {"pytorch_model.bin": b""}, "only pickle weights .*Convert to safetensors: python -c"),
    "other pickle": (NO_WEIGHTS | {"weights.pt": b""}, "only pickle weights .*python -c 'import sys, torch"),
    "training leftovers": (NO_WEIGHTS | {"training_args.bin": b""}, "has no weights"),
    "other name": (NO_WEIGHTS | {"gptq.safetensors": b""}, "has gptq.safetensors but no .*Rename it"),
    "GGUF": ({"model.gguf": b"GGUF"}, "holds GGUF files.*Take the safetensors"),
    "GGUF with config": (NO_WEIGHTS | {"model.gguf": b"GGUF"}, "holds GGUF files"),
    "LFS pointer": (model_files() | {"model.safetensors": b"version https://git-lfs..."}, "run: git lfs pull"),
    "renamed GGUF": (model_files() | {"model.safetensors": b"GGUF\3\0\0\0\1"}, "it is a GGUF file"),
    "renamed pickle": (model_files() | {"model.safetensors": b"PK\3\4\0\0\0\1"}, "it is a PyTorch pickle"),
    "empty": (model_files() | {"model.safetensors": b""}, "it has only 0 bytes.* Delete .* download it again"),
    "too long": (model_files() | {"model.safetensors": safetensors({"a": b"1"}) + b"x"}, "it is too long"),
    "no index map": (sharded_files() | {"model.safetensors.index.json": b"{}"}, "has no weight_map"),
    "escaping shard": (
        sharded_files() | {"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'},
        "not a file of this folder",
    ),
    "adapter without weights": ({"adapter_config.json": b'{"peft_type": "LORA"}'}, "no adapter_model.safetensors"),
    "pickled adapter": (
        {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.bin": b""},
        r"Convert to safetensors: .*adapter_model\.safetensors",
    ),
    "other adapter": (adapter_files("x", peft_type="IA3"), "only LoRA"),
    "classifier adapter": (adapter_files("x", task_type="SEQ_CLS"), "only CAUSAL_LM"),
    "adapter of nothing": (adapter_files(""), "Set base_model_name_or_path"),
}


@pytest.mark.parametrize(("files", "message"), REFUSALS.values(), ids=REFUSALS)
def test_folder_is_refused_with_the_remedy(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as refused:
        load(write(tmp_path, files))
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("shard", [name for name in sharded_files() if name.startswith("model-")])
def test_missing_shard_is_named(tmp_path: Path, shard: str) -> None:
    write(tmp_path, sharded_files())
    (tmp_path / shard).unlink()
    with pytest.raises(ModelLoadError, match=f"index.json names {shard}, which is missing"):
        load(tmp_path)


def test_shard_of_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, sharded_files() | {"model-00002-of-00002.safetensors": safetensors({"c": b"56"})})
    with pytest.raises(ModelLoadError, match=r"promises b in model-00002-of-00002\.safetensors, which lacks it"):
        load(tmp_path)


names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(names, st.binary(max_size=40), max_size=5), st.data())
def test_truncated_file_is_always_refused(tensors: dict[str, bytes], data: st.DataObject) -> None:
    whole = safetensors(tensors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(whole)
        assert verify_file(path) == set(tensors)
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(ModelLoadError):
            verify_file(path)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_read_but_never_crash(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(len(data).to_bytes(8, "little") + data)
        with pytest.raises(ModelLoadError):
            verify_file(path)


@pytest.mark.parametrize(
    "header", [{"a": {}}, {"a": 1}, [], {"a": {"data_offsets": [4, 2]}}, {"a": {"data_offsets": [1]}}]
)
def test_malformed_header_is_refused(tmp_path: Path, header: object) -> None:
    raw = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ModelLoadError, match="its header is not one of a safetensors file"):
        verify_file(tmp_path / "x")


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/no-such-model", "a/b/c"])
def test_missing_folder_is_refused(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"{name} does not exist: looked for a folder, and it is not a Hub id"):
        locate(name)


@pytest.mark.parametrize("name", ["", "a b", "owner/na..me", "x\n", "owner/", "-x/y"])
def test_malformed_name_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="owner/name"):
        locate(name)


def test_address_of_a_model_page_is_corrected() -> None:
    with pytest.raises(ConfigError, match="write Qwen/Qwen3-4B"):
        locate("https://huggingface.co/Qwen/Qwen3-4B/tree/main")


@pytest.mark.parametrize(
    ("name", "message"), [("x.gguf", "holds GGUF"), ("x.safetensors", "is a file: name the folder")]
)
def test_file_instead_of_a_folder_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ModelLoadError, match=message):
        locate(str(tmp_path / name))


def test_dangling_link_is_named(tmp_path: Path) -> None:
    write(tmp_path, NO_WEIGHTS)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(ModelLoadError, match=r"is a link to .*blob, which is missing"):
        locate(str(tmp_path))


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that another user may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("name", [".", "config.json", "tokenizer.json", "model.safetensors"])
def test_unreadable_file_is_reported_as_unreadable(public_folder: Path, name: str) -> None:
    model = write(public_folder / "model", model_files())
    (model / name).chmod(0)
    uid = os.getuid() or 65534
    code = (
        "import os, sys; from serve import weights; from serve.errors import ModelLoadError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: weights.locate(sys.argv[1])\n"
        "except ModelLoadError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, model], cwd=ROOT, capture_output=True, text=True, check=True)
    (model / name).chmod(0o755)
    assert f"{model / name} exists but is not readable by uid {uid}. Run: chmod -R a+rX" in result.stdout


def test_adapter_resolves_to_its_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model_files())
    adapter = write(tmp_path / "adapter", adapter_files(str(base)))
    source = fetch_weights(locate(str(adapter)))
    assert (source.folder, source.adapter, source.tokenizer_folder) == (base, adapter, base)
    assert source.num_bytes == (base / "model.safetensors").stat().st_size


def test_adapter_with_a_tokenizer_uses_its_own(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model_files())
    adapter = write(tmp_path / "adapter", adapter_files(str(base)) | {"tokenizer.json": b"{}"})
    assert locate(str(adapter)).tokenizer_folder == adapter


def test_merged_model_with_a_leftover_adapter_config_is_a_model(tmp_path: Path) -> None:
    files = model_files() | {"adapter_config.json": adapter_files("elsewhere")["adapter_config.json"]}
    assert locate(str(write(tmp_path, files))).adapter is None


def test_adapter_with_an_unusable_base_names_both(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", adapter_files("/no/such/base"))
    with pytest.raises(
        ModelLoadError, match=rf"{adapter} is a LoRA adapter whose base model /no/such/base .*does not exist"
    ):
        locate(str(adapter))


def test_adapter_of_an_adapter_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "first", adapter_files("x"))
    second = write(tmp_path / "second", adapter_files(str(first)))
    with pytest.raises(ModelLoadError, match="which is an adapter itself"):
        locate(str(second))


def test_truncated_adapter_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model_files())
    adapter = write(tmp_path / "adapter", adapter_files(str(base)))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match="it is cut short"):
        load(adapter)


def test_needed_files_are_what_serving_reads_and_nothing_else(tmp_path: Path) -> None:
    names = [
        "tokenizer.json",
        "optimizer.pt",
        "README.md",
        "modeling_own.py",
        "chat_template.jinja",
        "pytorch_model.bin",
    ]
    write(tmp_path, {**model_files(), **dict.fromkeys(names, b"{}")})
    source = locate(str(tmp_path))
    expected = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert set(needed_files(source)) == expected
    assert set(needed_files(source, trust_remote_code=True)) == {*expected, "modeling_own.py"}
