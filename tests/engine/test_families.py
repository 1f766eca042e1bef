"""Every architecture is served exactly, in batches or one request at a time, and says which."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Family, Served, save, table
from tiny import Loaded, collect, generate_alone, load, request

from serve.errors import ModelLoadError
from serve.types import SamplingParams

LENGTHS = (1, 7, 19, 40)
"""Below, at and beyond the window and the chunk, and never a multiple of both."""

UNRECORDED = re.compile(r"experts|^GPT2")
"""Experts are chosen by numbers that Python reads or writes in place; GPT-2 looks for padding among the token ids."""


def prompts_for(loaded: Loaded) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, loaded.vocab_size) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other over matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
async def test_family_served_together_equals_generate_alone(family: Family, tmp_path):
    folder = save(tmp_path, family)
    if family.served is Served.REFUSED:
        with pytest.raises(ModelLoadError, match=family.note):
            load(folder)
        return
    loaded = load(folder, chunk=16, slots=3, num_threads=1)
    reason = loaded.runner.alone_reason
    assert reason is None if family.served is Served.BATCHED else family.note in (reason or ""), reason
    if loaded.runner._device.value.type == "cpu":
        is_recorded = loaded.runner._program is not None
        assert is_recorded == (family.served is Served.BATCHED and not UNRECORDED.search(family.id))
    prompts = prompts_for(loaded)
    expected = [generate_alone(loaded, prompt, 12) for prompt in prompts]
    async with loaded.running() as engine:
        greedy = SamplingParams(max_tokens=12, temperature=0.0)
        streams = [engine.submit(request(prompt, greedy)) for prompt in prompts]
        got = await asyncio.gather(*(collect(stream) for stream in streams))
    assert [answer.token_ids for answer in got] == expected


def test_documentation_shows_this_table():
    page = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
    assert table() in page.read_text(encoding="utf-8")
