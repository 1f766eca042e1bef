"""RoPE that follows the longest position: a neighbour's prompt must not turn anybody else's keys."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BASE, Family, save
from tiny import collect, generate_alone, load, native, request

from serve.engine import gate
from serve.engine.survey import NotBatchable
from serve.types import SamplingParams

SERVED, ORIGINAL = 128, 32
SHORT, LONG_FACTORS = [1.0] * 8, [2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0]
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": LONG_FACTORS,
    "short_factor": SHORT,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def dynamic_twin() -> dict[str, Any]:
    dim, factor = BASE["head_dim"], DYNAMIC["factor"]
    stretched = 10000.0 * (factor * SERVED / ORIGINAL - (factor - 1)) ** (dim / (dim - 2))
    return {"rope_type": "default", "rope_theta": stretched}


CASES = {
    "longrope": (
        Family("Phi3", config={"rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL}),
        LONG | {"short_factor": LONG_FACTORS},
    ),
    "dynamic": (Family("Llama", config={"rope_parameters": DYNAMIC}), dynamic_twin()),
}


def twin_of(folder: Path, rope: dict[str, Any]) -> Path:
    """The same weights with frequencies that never change."""
    twin = shutil.copytree(folder, folder.with_name("twin"))
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    return twin


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("in_batches", [True, False])
async def test_rope_is_that_of_the_served_context_whoever_runs_beside(tmp_path, monkeypatch, kind, in_batches):
    torch.set_num_threads(1)
    family, static = CASES[kind]
    length = ORIGINAL if kind == "dynamic" else SERVED
    folder = save(tmp_path / "model", family, max_position_embeddings=length)
    twin = load(twin_of(folder, static), num_threads=1)
    if not in_batches:
        monkeypatch.setattr(gate, "survey", lambda model: (_ for _ in ()).throw(NotBatchable("a test")))
    loaded = load(folder, chunk=16, slots=3, num_threads=1, max_model_len=SERVED)
    assert (loaded.runner.alone_reason is None) == in_batches
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 300) for _ in range(size)] for size in (5, 90, 20, 40)]
    expected = [generate_alone(twin, prompt, 12) for prompt in prompts]
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    async with loaded.running() as engine:
        alone = [(await collect(engine.submit(request(prompt, greedy)))).token_ids for prompt in prompts]
        streams = [engine.submit(request(prompt, greedy)) for prompt in prompts]
        together = [answer.token_ids for answer in await asyncio.gather(*(collect(stream) for stream in streams))]
    assert alone == expected
    assert together == expected


async def prompt_logprobs(engine: Any, row: list[int]) -> torch.Tensor:
    """``[len(row) - 1]``: what the engine gives each token of a prompt but the first."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    events = [event async for batch in engine.submit(request(row, params)) for event in batch]
    return torch.tensor([each.logprob for each in events[0].prompt_logprobs if each])


async def test_dynamic_rope_gives_what_transformers_gives_in_a_pass_of_the_served_length(tmp_path):
    """Its frequencies follow the length of the pass: one as long as the served context is the oracle for any prefix."""
    torch.set_num_threads(1)
    folder = save(tmp_path / "model", CASES["dynamic"][0], max_position_embeddings=ORIGINAL)
    loaded = load(folder, chunk=16, slots=3, num_threads=1, max_model_len=SERVED)
    draw = random.Random(1)
    row = [draw.randrange(3, 300) for _ in range(SERVED)]

    def native_logprobs(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = native(loaded)(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    expected = native_logprobs(row)
    unstretched = (native_logprobs(row[: ORIGINAL - 1]) - expected[: ORIGINAL - 2]).abs().max()
    assert unstretched > 1e-3, "the length must matter, or this shows nothing"
    lengths = (5, ORIGINAL, 90, SERVED - 1)
    async with loaded.running() as engine:
        alone = [await prompt_logprobs(engine, row[:length]) for length in lengths]
        together = await asyncio.gather(*(prompt_logprobs(engine, row[:length]) for length in lengths))
    for length, *found in zip(lengths, alone, together, strict=True):
        for each in found:
            assert (each - expected[: length - 1]).abs().max() < 1e-4
