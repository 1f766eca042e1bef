"""Vectors: batched as alone, as transformers and the pooling's definition say, in the order of the texts."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from serve.chat.tokenizer import HubTokenizer
from serve.embedding_recipe import POOLINGS, read_recipe
from serve.engine import embedder as embedder_module
from serve.engine.embedder import Embedder
from serve.engine.embedding_model import EncoderModel
from serve.errors import GenerationFailed, ModelLoadError, OutOfMemory, ShuttingDown

TEXTS = [
    "A boat with one main hull and two outriggers.",
    "A ship that has a main hull and an outrigger on each side.",
    "The stock market fell sharply on Monday.",
    "é日本 🫠",
    "word " * 200,
]


def numbers(vector: bytes | None) -> torch.Tensor:
    assert vector is not None
    return torch.tensor(struct.unpack(f"<{len(vector) // 4}f", vector))


@pytest.fixture(scope="module")
def minilm(demo_embedding: Path) -> EncoderModel:
    recipe = read_recipe(demo_embedding, json.loads((demo_embedding / "config.json").read_text()))
    return EncoderModel(demo_embedding, pooling=recipe.pooling, normalizes=recipe.normalizes, device="cpu")


@pytest.fixture(scope="module")
def token_ids(demo_embedding: Path) -> list[list[int]]:
    tokenizer = HubTokenizer(demo_embedding)
    return [tokenizer.encode(text, adds_special=True) for text in TEXTS]


def test_recipe_of_minilm_is_what_its_files_say(demo_embedding: Path) -> None:
    recipe = read_recipe(demo_embedding, json.loads((demo_embedding / "config.json").read_text()))

    assert (recipe.pooling, recipe.normalizes, recipe.max_tokens) == ("mean", True, 256)
    assert recipe.dimensions is False


def test_vectors_are_those_of_transformers(
    minilm: EncoderModel, token_ids: list[list[int]], demo_embedding: Path
) -> None:
    """Its own tokenizer, its own batch, and the mean over the mask written out."""
    tokenizer: Any = AutoTokenizer.from_pretrained(demo_embedding)
    model: Any = AutoModel.from_pretrained(demo_embedding).eval()
    batch = tokenizer(TEXTS, padding="longest", return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    assert [row[: len(ids)].tolist() for row, ids in zip(batch["input_ids"], token_ids, strict=True)] == token_ids
    found = torch.stack([numbers(vector) for vector in minilm.embed(token_ids)])
    assert torch.allclose(found, expected, atol=1e-5)


def test_vectors_are_the_same_alone_and_together(minilm: EncoderModel, token_ids: list[list[int]]) -> None:
    together = minilm.embed(token_ids)
    for ids, vector in zip(token_ids, together, strict=True):
        assert torch.allclose(numbers(minilm.embed([ids])[0]), numbers(vector), atol=1e-5)


def test_vectors_of_like_texts_are_near(minilm: EncoderModel, token_ids: list[list[int]]) -> None:
    boat, vessel, market = (numbers(vector) for vector in minilm.embed(token_ids[:3]))

    assert torch.linalg.norm(boat) == pytest.approx(1.0, abs=1e-5)
    assert boat @ vessel > 0.5
    assert boat @ market < 0.2


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", POOLINGS.values())
@pytest.mark.parametrize("normalizes", [False, True])
def test_pooling_is_its_definition(tiny_bert: Path, pooling: str, normalizes: bool) -> None:
    model = EncoderModel(tiny_bert, pooling=pooling, normalizes=normalizes, device="cpu")
    native: Any = AutoModel.from_pretrained(tiny_bert).eval()
    texts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    for ids, vector in zip(texts, model.embed(texts), strict=True):
        with torch.inference_mode():
            states = native(torch.tensor([ids])).last_hidden_state[0]
        expected = {
            "mean": states.mean(0),
            "cls": states[0],
            "max": states.amax(0),
            "mean_sqrt_len_tokens": states.sum(0) / len(ids) ** 0.5,
            "lasttoken": states[-1],
        }[pooling]
        if normalizes:
            expected = expected / expected.norm()
        assert torch.allclose(numbers(vector), expected, atol=1e-5)


def write(folder: Path, modules: list[str], pooling: dict[str, Any] | None) -> None:
    (folder / "1_Pooling").mkdir()
    entries = [
        {"type": f"sentence_transformers.models.{kind}", "path": "1_Pooling" if kind == "Pooling" else ""}
        for kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    if pooling is not None:
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("modules", "pooling", "words"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "Dense"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "mean and cls",
        ),
        (["Transformer", "Pooling"], {"pooling_mode_weightedmean_tokens": True}, "no known"),
        (["Transformer", "Pooling"], {"pooling_mode": "weightedmean"}, "weightedmean"),
    ],
)
def test_recipe_refuses_what_is_not_served(
    tmp_path: Path, modules: list[str], pooling: dict[str, Any], words: str
) -> None:
    write(tmp_path, modules, pooling)

    with pytest.raises(ModelLoadError, match=words):
        read_recipe(tmp_path, {})


def test_recipe_without_files_is_the_mean(tmp_path: Path) -> None:
    recipe = read_recipe(tmp_path, {"max_position_embeddings": 128, "is_matryoshka": True})

    assert (recipe.pooling, recipe.normalizes, recipe.max_tokens, recipe.dimensions) == ("mean", False, 128, True)


class Recorder:
    """A model that notes its batches, waits for the gate, and answers with the first token."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.batches: list[list[int]] = []
        self.failure: Exception | None = None

    def embed(self, batch: Sequence[Sequence[int]]) -> list[bytes | None]:
        self.batches.append([text[0] for text in batch])
        assert self.gate.wait(10)
        if self.failure:
            raise self.failure
        return [bytes([text[0]]) if text[0] else None for text in batch]


def test_embedder_batches_what_waits_and_lets_nobody_wait_for_a_long_list() -> None:
    model = Recorder()
    embedder = Embedder(model)
    first = embedder.submit([[1]])
    while not model.batches:
        pass
    long = embedder.submit([[10 + at % 200] for at in range(100)])
    short = embedder.submit([[2], [3]])
    left = embedder.submit([[4]])
    assert left[0].cancel()
    model.gate.set()

    assert [future.result(10) for future in (*first, *short)] == [b"\x01", b"\x02", b"\x03"]
    assert [future.result(10)[0] for future in long] == [10 + at % 200 for at in range(100)]
    assert {2, 3} <= set(model.batches[1])
    assert all(4 not in batch for batch in model.batches)
    embedder.close()
    with pytest.raises(ShuttingDown):
        embedder.submit([[1]])


@pytest.mark.parametrize("failure", [OutOfMemory("full"), KeyError("unforeseen")])
def test_embedder_survives_a_failed_batch(failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    model = Recorder()
    model.gate.set()
    embedder = Embedder(model)
    model.failure = failure
    failed = embedder.submit([[1], [2]])
    for future in failed:
        assert type(future.exception(10)) is (OutOfMemory if isinstance(failure, OutOfMemory) else GenerationFailed)
    model.failure = None

    broken, fine = embedder.submit([[0], [7]])
    assert isinstance(broken.exception(10), GenerationFailed)
    assert fine.result(10) == b"\x07"
    embedder.close()


def test_embedder_tells_of_a_batch_that_hangs_and_ends_its_requests() -> None:
    model = Recorder()
    embedder = Embedder(model)
    assert embedder.batch_age_s == 0.0
    running = embedder.submit([[1], [2]])
    while not model.batches:
        pass
    waiting = embedder.submit([[3]])
    time.sleep(0.02)
    assert embedder.batch_age_s >= 0.02
    embedder.fail_all(ShuttingDown("over"))
    for future in (*running, *waiting):
        assert isinstance(future.exception(0), ShuttingDown)
    model.gate.set()
    assert [future.result(10) for future in embedder.submit([[4]])] == [b"\x04"]  # what came too late hurt nothing
    embedder.close()


def test_embedder_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with a broken model has to end soon, so that another one begins."""
    model = Recorder()
    embedder = Embedder(model)
    embedder.submit([[1]])
    while not model.batches:
        pass
    time.sleep(0.02)
    monkeypatch.setattr(embedder_module, "LAST_BATCH_S", 0.01)
    closing = threading.Thread(target=embedder.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    model.gate.set()


def test_embedder_survives_a_model_that_forgets_a_text() -> None:
    class Short:
        def embed(self, batch: Sequence[Sequence[int]]) -> list[bytes | None]:
            return [b"x"] * (len(batch) - 1)

    embedder = Embedder(Short())
    for _ in range(2):
        (future,) = embedder.submit([[1]])
        assert isinstance(future.exception(10), GenerationFailed)
    embedder.close()


def test_embedder_that_loads_torch_first_leaves_its_threads_passive(tmp_path: Path) -> None:
    """Spinning threads would slow every model of the process; the generating model is loaded later."""
    program = (
        "import os, pathlib, sys\n"
        "from serve.engine.embedding_model import EncoderModel\n"
        "try:\n"
        "    EncoderModel(pathlib.Path(sys.argv[1]), pooling='mean', normalizes=True, device='cpu')\n"
        "finally:\n"
        "    print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )

    assert ran.stdout.split() == ["PASSIVE", "True"]
    assert "transformers cannot load the embedding model" in ran.stderr
