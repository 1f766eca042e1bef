"""The gate: what would be wrong in a batch is found out, whatever the model says about itself."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from families import FAMILIES, MIXED, SLIDING, Family, save
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llama
from transformers.masking_utils import (
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from serve import compare, kernels
from serve.engine import compiled, gate, survey
from serve.engine.attention import NAME
from serve.engine.base import EngineConfig, ModelFiles
from serve.engine.patterns import FULL, Kind, Pattern
from serve.engine.survey import NotBatchable, agrees
from serve.engine.verdicts import Verdict, VerdictFile

PATTERNS = st.builds(Pattern, st.sampled_from([Kind.SLIDING, Kind.CHUNKED]), st.integers(1, 40)) | st.just(FULL)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def build(folder, family: Family, **changes):
    return transformers.AutoModelForCausalLM.from_pretrained(save(folder, family, **changes)).eval()


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    del batch, head
    return key <= query


def nothing_kept() -> VerdictFile:
    return VerdictFile(None, [], [])


@given(PATTERNS, st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_pattern_shows_one_range_of_keys_that_ends_at_the_query(pattern, queries):
    keys = torch.arange(0, 105)
    seen = pattern.visible(torch.tensor(queries), keys)
    assert pattern.first_of(torch.tensor(queries)).tolist() == [pattern.first(query) for query in queries]
    for row, query in zip(seen, queries, strict=True):
        assert keys[row].tolist() == list(range(pattern.first(query), query + 1))


@given(st.integers(1, 200_000), st.integers(-2, 2))
def test_windows_and_chunks_of_any_size_are_told_from_their_neighbours(size, off):
    claimed = max(1, size + off)
    masks = {
        Kind.SLIDING: sliding_window_causal_mask_function(size),
        Kind.CHUNKED: chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int)),
    }
    for kind, mask in masks.items():
        assert agrees(Pattern(kind, claimed), mask, {size, claimed}) == (claimed == size)
        # A window or chunk of one token is the same thing.
        for other in {Pattern(other, size) for other in masks if other is not kind and size > 1} | {FULL}:
            assert not agrees(other, mask, {size})
            assert not agrees(Pattern(kind, size), causal, {size})


def test_survey_reads_each_layers_pattern_also_of_windows_longer_than_any_probe(tmp_path):
    window = {**MIXED, "sliding_window": 100_000, "query_pre_attn_scalar": 16, "max_position_embeddings": 131_072}
    model = build(tmp_path, Family("Gemma2", config=window))
    sliding = Pattern(Kind.SLIDING, 100_000)
    assert survey.survey(model).patterns == (sliding, FULL, sliding)


def test_layers_that_see_something_else_are_not_taken_for_full_attention(tmp_path, monkeypatch):
    model = build(tmp_path, Family("Mistral", config=SLIDING))
    every_other = lambda batch, head, query, key: (key <= query) & ((query - key) % 2 == 0)  # noqa: E731
    monkeypatch.setattr(transformers.masking_utils, "sliding_window_causal_mask_function", lambda size: every_other)
    with pytest.raises(NotBatchable, match="layer 0 sees other tokens"):
        gate.examine(model, nothing_kept())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Lfm2", "3 layers, but 1 of them"),
        ("MiniMax", "3 layers, but 2 of them"),
        ("Bloom", "3 layers, but 0 of them"),
        ("FalconH1", r"differ from those alone by \d"),  # attention and a recurrent part in every layer
    ],
)
def test_model_that_keeps_quiet_about_its_state_is_found_out(tmp_path, monkeypatch, name, reason):
    model = build(tmp_path, named(name))
    monkeypatch.setattr(survey, "check_claims", lambda model: None)
    own = model.config._attn_implementation
    with pytest.raises(NotBatchable, match=reason):
        gate.examine(model, nothing_kept())
    assert model.config._attn_implementation == own


def test_attention_that_asks_for_more_than_the_engine_does_is_named(tmp_path, monkeypatch):
    model = build(tmp_path, named("Llama"))
    attend = type(model.model.layers[0].self_attn).forward

    def with_bias(self, hidden_states, *args, **kwargs):
        return attend(self, hidden_states, *args, **kwargs, position_bias=torch.zeros(1))

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", with_bias)
    with pytest.raises(NotBatchable, match="its attention uses position_bias"):
        survey.survey(model)


def test_verdict_is_used_again_for_the_same_files_and_versions_only(tmp_path, monkeypatch):
    folder, kept = tiny_llama(tmp_path / "model"), tmp_path / "kept"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    calls = []
    monkeypatch.setattr(gate, "compare", lambda model, seen: calls.append(seen) or 0.0)

    def examine(*facts: str, cache=kept) -> None:
        model.set_attn_implementation("sdpa")
        gate.examine(model, VerdictFile(cache, [folder], facts))
        assert model.config._attn_implementation == NAME

    examine("torch 1")
    examine("torch 1")
    assert len(calls) == 1
    examine("torch 2")
    assert len(calls) == 2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    examine("torch 2")
    assert len(calls) == 3
    for path in kept.rglob("*.json"):
        path.write_text("{torn")
    examine("torch 2")
    assert len(calls) == 4
    examine("torch 2", cache=tmp_path / "model" / "config.json")  # no folder can be made there
    assert len(calls) == 5


def test_refusal_is_kept_too(tmp_path, monkeypatch):
    folder = save(tmp_path / "model", named("FalconH1"))
    kept = VerdictFile(tmp_path / "kept", [folder], [])
    kept.write(Verdict("it is wrong by 3", None))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    monkeypatch.setattr(gate, "compare", lambda *_: pytest.fail("compared again"))
    monkeypatch.setattr(gate, "survey", lambda model: None)
    with pytest.raises(NotBatchable, match="wrong by 3"):
        gate.examine(model, kept)


def test_comparison_without_the_compiled_kernels_says_nothing_about_them(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    files = ModelFiles(folder=tmp_path / "model", decode=str, eos_token_ids=frozenset(), max_model_len=64)

    def kept(dtype: torch.dtype) -> VerdictFile:
        return gate.verdict_file(files, dtype, torch.device("cpu"), tmp_path / "kept")

    monkeypatch.setattr(compiled, "library", lambda: None)
    for dtype in (torch.bfloat16, torch.float32):
        kept(dtype).write(Verdict(None, 0.1))
    monkeypatch.setattr(compiled, "library", lambda: "found")
    assert kept(torch.bfloat16).read() is None
    assert kept(torch.float32).read() == Verdict(None, 0.1)
    kept(torch.bfloat16).write(Verdict(None, 0.2))
    assert kept(torch.bfloat16).read() == Verdict(None, 0.2)
    monkeypatch.setattr(kernels, "FLAGS", "-O0")
    assert kept(torch.bfloat16).read() is None, "of other sources or flags"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_verdict_folder_may_be_missing_or_read_only(tmp_path):
    assert VerdictFile(None, [], []).read() is None
    VerdictFile(None, [], []).write(Verdict(None, 0.0))
    assert VerdictFile(tmp_path / "none", [tmp_path], []).read() is None


def test_comparison_of_a_build_is_found_by_every_start_in_either_format(demo_model, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "baked"
    folder.mkdir()
    for file in demo_model.iterdir():
        (folder / file.name).symlink_to(file)
    monkeypatch.setenv("SERVE_MODEL", str(folder))
    monkeypatch.setenv("SERVE_CACHE_DIR", str(tmp_path / "cache"))
    assert compare.main() == 0
    said = capsys.readouterr().err
    assert [f"in {name}: compared; it will run in batches" in said for name in compare.FORMATS] == [True, True]
    assert not (tmp_path / "cache").exists()

    monkeypatch.setattr(gate, "compare", lambda *_: pytest.fail("compared again"))
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        files = ModelFiles(folder=folder, decode=str, eos_token_ids=frozenset(), max_model_len=64)
        gate.examine(model, gate.verdict_file(files, dtype, torch.device("cpu"), None))
        assert model.config._attn_implementation == NAME
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*/*.json")} == {0o644}, "others serve than build"


def test_build_compares_no_model_that_would_not_fit_beside_it(tmp_path, monkeypatch):
    folder = tiny_llama(tmp_path / "model")
    monkeypatch.setattr(compare, "available_ram", lambda: 1000)
    monkeypatch.setattr(gate, "examine", lambda *_: pytest.fail("compared"))
    files = ModelFiles(folder=folder, decode=str, eos_token_ids=frozenset(), max_model_len=64, num_bytes=10_000)
    assert "not compared: it takes" in compare.compared(files, EngineConfig(), "float32")
