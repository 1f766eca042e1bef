"""Steps from a record: the model's own numbers for batches of every size, or no record."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import load, tiny_llama
from torch import Tensor, nn
from toy import graph_of, inputs, of_ids

from serve.engine import gate, packed, program
from serve.engine.attention import make_context, running
from serve.engine.recorder import NotReplayable
from serve.engine.sequence import Batch, Chunk, Sequence
from serve.types import GenerationRequest, SamplingParams

WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def views(ids: Tensor) -> Tensor:
    """Views of views, of results and of weights; sizes, strides and offsets that grow with the rows."""
    hidden = nn.functional.embedding(ids, WEIGHT)
    halves = hidden.view(1, ids.shape[1], 2, 4).transpose(1, 2)
    first, second = halves[..., :2], halves[..., 2:]
    turned = torch.cat((-second, first), -1) * WEIGHT[:1, 4:].float()
    flat = turned.transpose(1, 2).reshape(1, -1, 8)
    return torch.cat((flat, hidden.flip(1)[:, -1:].expand_as(flat)), -1).flatten(1).unflatten(1, (-1, 16))


def norms(ids: Tensor) -> Tensor:
    """The same twice, a part that depends on weights alone, and results that nobody uses."""
    hidden = nn.functional.embedding(ids, WEIGHT)
    scale = (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    again = (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    hidden.exp()
    return hidden * scale * (1 + WEIGHT[0]) + again * torch.arange(ids.shape[1])[None, :, None]


def parts(ids: Tensor) -> Tensor:
    """Operators with several results, options, and an index."""
    hidden = nn.functional.embedding(ids, WEIGHT)
    best, places = hidden.topk(3, -1)
    first, *rest = hidden.split([2, 2, 4], -1)
    kept = torch.cat([best, places.to(torch.float32), first, *rest], -1)
    mixed = nn.functional.dropout(nn.functional.gelu(kept, approximate="tanh"), 0.5, training=False)
    return mixed[:, torch.arange(ids.shape[1] - 1, -1, -1)].softmax(-1)


def chosen(ids: Tensor, wanted: Tensor) -> Tensor:
    """Some rows of logits, beside numbers of all rows; sizes of both kinds in one tensor."""
    hidden = nn.functional.embedding(ids, WEIGHT)
    rows = hidden[:, wanted].view(1, -1, 2, 4).transpose(1, 2)
    both = torch.cat((rows.reshape(1, -1, 4), hidden[..., :4].exp()), 1)
    return both[:, 1:] * both[:, -1:].expand(1, both.shape[1] - 1, 4)


@pytest.mark.parametrize(
    "forward", [pytest.param(of_ids(each), id=each.__name__) for each in (views, norms, parts)] + [chosen]
)
def test_program_of_three_recordings_equals_the_function_for_every_size(forward):
    run = program.compiled(graph_of(forward))
    for columns in [*range(1, 20), 64, 257]:
        for wanted in (1, 2, columns, columns + 3):
            given = inputs(columns, wanted)
            with torch.inference_mode():
                assert torch.equal(run(columns, wanted, *given), forward(*given)), (columns, wanted)


def test_program_computes_nothing_twice_or_for_nobody():
    names = [getattr(node.function, "__name__", "") for node in graph_of(of_ids(norms)).nodes]
    assert names.count("pow") == names.count("rsqrt") == names.count("mean") == 1
    assert not any("exp" in name for name in names)
    assert names.count("add") == 2, "1 + weight is known before"


NAME = r"[vc]\d+"
LINE = re.compile(rf" ({NAME}(, {NAME})* = {NAME}\(.*\)|del {NAME}(, {NAME})*|return {NAME})")


@pytest.mark.parametrize("forward", [views, norms, parts])
def test_source_of_a_program_is_numbers_and_names_of_its_own(forward):
    """Nothing that a model, a file or a request says is ever run as text."""
    first, *lines = program.source(graph_of(of_ids(forward))).splitlines()
    assert re.fullmatch(rf"def run\(n, k, {NAME}, {NAME}\):", first)
    assert all(LINE.fullmatch(line) for line in lines)
    words = {word for line in lines for word in re.findall(r"\b[A-Za-z_]\w*\b(?!=)", line)}
    strange = {word for word in words if not re.fullmatch(NAME, word)}
    assert strange <= {"n", "k", "del", "return", "None", "True", "False"}, "but for the names of options"
    assert not any(quote in line for line in lines for quote in "\"'")


def test_program_keeps_one_and_one_point_zero_apart():
    def forward(ids: Tensor) -> Tensor:
        return torch.cat((ids * 1, (ids * 1.0).int()), -1) + (ids * 1.0 / 2).sum()

    run = program.compiled(graph_of(of_ids(forward)))
    ids, wanted = inputs(7, 1)
    assert run(7, 1, ids, wanted).dtype == forward(ids).dtype
    assert torch.equal(run(7, 1, ids, wanted), forward(ids))


COUNTS = torch.zeros(6)


def counts(ids: Tensor) -> Tensor:
    COUNTS.add_(1)
    return nn.functional.embedding(ids, WEIGHT)


def grown(ids: Tensor) -> Tensor:
    """More operators where there are more rows."""
    hidden = nn.functional.embedding(ids, WEIGHT)
    return torch.stack([hidden[:, row].exp() for row in range(ids.shape[1])])


REFUSED: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("item", lambda ids: nn.functional.embedding(ids, WEIGHT) * ids.max().item(), "numbers"),
    ("branch", lambda ids: ids * 2 if ids[0, 0] > 2 else ids, "numbers"),
    ("list", lambda ids: ids + sum(ids.tolist()[0]), "numbers"),
    ("array", lambda ids: ids + int(ids.numpy().sum()), "numbers"),
    ("equal", lambda ids: ids if torch.equal(ids, ids) else ids + 1, "numbers"),
    ("nonzero", lambda ids: ids.nonzero().T + 1, "numbers"),
    ("mask", lambda ids: ids[ids > 2] + 1, "numbers"),
    ("random", lambda ids: torch.rand_like(ids, dtype=torch.float32) + ids, "numbers"),
    ("dropout", lambda ids: nn.functional.dropout(ids.float(), 0.5), "numbers"),
    ("counts", counts, "in place"),
    ("grown", grown, "rows"),
    ("fixed", lambda ids: torch.ones(3), "input"),
]


@pytest.mark.parametrize(("forward", "reason"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
def test_record_refuses_what_another_pass_would_do_otherwise(forward, reason):
    with pytest.raises(NotReplayable, match=reason):
        program.compiled(graph_of(of_ids(forward)))


def decodes(loaded: Any, rows: int, draw: random.Random) -> Batch:
    """Sequences at any positions, over whatever the slots hold."""
    sequences: list[Sequence] = []
    for slot in range(rows):
        position = draw.randrange(1, loaded.max_model_len)
        sequences.append(sequence(slot, position, [1] * position))
        sequences[-1].output_token_ids.append(draw.randrange(loaded.vocab_size))
    return Batch((), tuple(sequences), ())


def sequence(slot: int, num_computed_tokens: int, prompt: list[int]) -> Sequence:
    params = SamplingParams(max_tokens=1)
    request = GenerationRequest(request_id=str(slot), prompt_token_ids=tuple(prompt), params=params)
    return Sequence(request, slot, num_computed_tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.01)])
def test_recorded_step_equals_the_models_own_for_every_batch_size(tmp_path, dtype, tolerance):
    loaded = load(tiny_llama(tmp_path), slots=21, dtype=dtype, num_threads=1)
    runner, draw = loaded.runner, random.Random(1)
    if runner._program is None:
        pytest.skip("steps are recorded on a CPU only; run this test without TRIMARAN_TEST_DEVICE")
    for rows in range(1, 22):
        batch = decodes(loaded, rows, draw)
        if rows % 3 == 0:  # a whole prompt beside them, or a part of one
            prompt = sequence(rows - 1, 0, [draw.randrange(loaded.vocab_size) for _ in range(3 * rows)])
            batch = Batch((), batch.decodes[:-1], (Chunk(prompt, 0, draw.choice([2 * rows, 3 * rows])),))
        with torch.inference_mode():
            got = runner._program.logits(batch)
            expected = packed.forward(runner._model, batch, runner._cache)
        assert gate.off_by(expected.float(), got.float()) <= tolerance, rows


def test_model_that_differs_from_its_record_runs_through_its_modules(tmp_path, monkeypatch, caplog):
    compiled = program.compiled
    monkeypatch.setattr(program, "compiled", lambda graph: lambda *inputs: compiled(graph)(*inputs).flip(-1))
    caplog.set_level("INFO")
    runner = load(tiny_llama(tmp_path)).runner
    assert runner._program is None
    if runner._device.value.type == "cpu":
        assert "Steps: through the model's modules (recorded, they are off by" in caplog.text


def test_recording_leaves_the_models_attention_in_place(tmp_path):
    loaded = load(tiny_llama(tmp_path))
    model = loaded.runner._model
    assert model.config._attn_implementation == "trimaran"
    batch = decodes(loaded, 2, random.Random(0))
    cache = loaded.runner._cache
    with torch.inference_mode(), running(make_context(batch, cache, model.dtype, model.device)):
        logits = packed.call(model, packed.inputs_of(batch, model.device))
    assert logits.shape == (1, 2, loaded.vocab_size)
