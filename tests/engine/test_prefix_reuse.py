"""Reused prefixes change nothing but the work: tokens equal transformers' own ``generate``, turn after turn."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, save
from tiny import Loaded, collect, generate_alone, load, request

from serve.engine import kv_cache
from serve.engine.kv_cache import KVCache
from serve.engine.scheduler import Move
from serve.types import SamplingParams

REUSING = ("Llama", "Qwen3", "Mistral", "Gemma2", "Gemma3", "GptOss", "DeepseekV3", "GPTNeoX", "GPT2")
GREEDY = SamplingParams(max_tokens=10, temperature=0.0)


@pytest.fixture(scope="module", params=REUSING)
def loaded(request, tmp_path_factory) -> Loaded:
    family = next(family for family in FAMILIES if family.name == request.param)
    return load(save(tmp_path_factory.mktemp(request.param), family), chunk=40, slots=3, num_threads=1)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other over matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


async def test_conversations_that_share_and_branch_equal_generate(loaded):
    """More conversations than slots, all from one system prompt, some from each other's turns, some given up."""
    draw = random.Random(3)
    system = [draw.randrange(3, 300) for _ in range(70)]
    histories = [system + [draw.randrange(3, 300) for _ in range(size)] for size in (5, 30, 9, 17)]
    cached = 0
    async with loaded.running() as engine:
        for turn in range(4):
            wanted = [generate_alone(loaded, history, 10) for history in histories]
            streams = [engine.submit(request(history, GREEDY)) for history in histories]
            given_up = engine.submit(request([*histories[0], 7, 8, 9], GREEDY))
            await streams[0].next()
            given_up.close()
            got = await asyncio.gather(*map(collect_rest, streams))
            for history, answer, expected in zip(histories, got, wanted, strict=True):
                assert expected[-len(answer) :] == answer
                history += expected + [draw.randrange(3, 300) for _ in range(draw.choice((1, 6)))]
            if turn == 2:
                histories[3] = [*histories[1][:-5], 11, 12]  # branches off
            again = await collect(engine.submit(request(histories[2], GREEDY)))
            cached += again.usage.cached_tokens
            assert again.token_ids == generate_alone(loaded, histories[2], 10)
            assert again.usage.cached_tokens < again.usage.prompt_tokens
    assert cached > 3 * len(system), "nothing was reused"


async def collect_rest(stream: Any) -> list[int]:
    return (await collect(stream)).token_ids


async def test_other_scopes_start_from_nothing(loaded):
    prompt = [5 + number % 90 for number in range(60)]
    async with loaded.running() as engine:
        expected = generate_alone(loaded, prompt, 10)
        for scope, cached in (("mine", 0), ("yours", 0), ("mine", 59), ("yours", 59)):
            stream = engine.submit(replace(request(prompt, GREEDY), cache_scope=scope))
            answer = await collect(stream)
            assert (answer.token_ids, answer.usage.cached_tokens) == (expected, cached)


class Upwards:
    """A grammar in which each token is greater than the one before."""

    is_finished = False

    def __init__(self) -> None:
        self.last = 0

    def allowed(self) -> bytes:
        return (sum(1 << token_id for token_id in range(self.last + 1, 300))).to_bytes(38, "little")

    def accept(self, token_id: int) -> None:
        self.last = token_id


ASKING: dict[str, dict[str, Any]] = {
    "seed": {"temperature": 1.0, "seed": 4, "top_p": 0.9},
    "penalties": {"frequency_penalty": 0.9, "presence_penalty": 0.4, "repetition_penalty": 1.3},
    "logprobs": {"logprobs": 2},
    "grammar": {"grammar": Upwards, "max_tokens": 4},
    "prompt_logprobs": {"prompt_logprobs": 1, "logprobs": 1},
}


async def test_whatever_a_request_asks_is_the_same_after_a_reused_prefix(loaded):
    """The prompt's own tokens count for penalties, although they were not computed for this request."""
    prompt = [5 + number % 23 for number in range(60)]

    async def asked(engine: Any, name: str, scope: str) -> tuple[list[int], list[float], int]:
        params = replace(GREEDY, **ASKING[name])
        stream = engine.submit(replace(request(prompt, params), cache_scope=scope))
        events = [event async for some in stream for event in some]
        assert events[-1].error is None
        found = [*(entry for event in events for entry in event.logprobs), *(events[0].prompt_logprobs or ())]
        logprobs = [entry.logprob for entry in found if entry is not None]
        assert len(logprobs) == ("logprobs" in ASKING[name]) * 10 + ("prompt_logprobs" in ASKING[name]) * 59
        token_ids = [event.token_id for event in events if event.token_id is not None]
        return token_ids, logprobs, events[-1].usage.cached_tokens

    async with loaded.running() as engine:
        await collect(engine.submit(replace(request(prompt, GREEDY), cache_scope="warm")))
        for name in ASKING:
            cold, warm = await asked(engine, name, name), await asked(engine, name, "warm")
            assert warm[0] == cold[0], name
            assert warm[1] == pytest.approx(cold[1], abs=1e-3), name
            assert (cold[2], warm[2]) == (0, 0 if name == "prompt_logprobs" else 59), name


@pytest.mark.parametrize("is_blocked", [True, False])
def test_cache_carries_out_copies_and_exchanges_in_order(is_blocked, monkeypatch):
    """In blocks of 3 tokens, and token by token."""
    monkeypatch.setattr(kv_cache, "in_blocks", lambda *_: is_blocked)
    monkeypatch.setattr(kv_cache, "BLOCK_LEN", 3)
    cache = KVCache(4, 8, torch.float32, torch.device("cpu"))
    keys, values = cache.layer(0, torch.zeros(1, 2, 3), torch.zeros(1, 2, 5))

    def read(tensor: torch.Tensor, slot: int) -> list[float]:
        views = cache.tokens(tensor, slot, 0, 8)
        # The last two dimensions of a view are [heads, dim], or [tokens of a block, dim].
        rows = [view[..., 0, 0].flatten() if not is_blocked else view.select(-3, 0)[..., 0].flatten() for view in views]
        return [number for row in rows for number in row.tolist()]

    for slot, length in enumerate((6, 3, 8, 7)):
        cache.extend(slot, 0, length)
        places = cache.rows([slot] * length, range(length))
        kv_cache.write(keys, places, torch.full((length, 2, 3), slot + 1.0))
        kv_cache.write(values, places, torch.full((length, 2, 5), 10 * (slot + 1.0)))
    cache.move([Move(0, 3, 5), Move(1, 2, 3, is_swap=True), Move(2, 0, 2)])
    assert [read(keys, slot) for slot in range(4)] == [
        [2, 2, 0, 0, 0, 0, 0, 0],
        [3, 3, 3, 3, 3, 3, 3, 3],
        [2, 2, 2, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
    ]
    assert [read(values, slot) for slot in range(4)] == [[10 * each for each in read(keys, slot)] for slot in range(4)]
    cache.extend(1, 3, 4)
    assert read(keys, 1) == [3, 3, 3, 0, 0, 0, 0, 0], "what lay behind is not zero"
    assert cache.bytes_per_token == 4 * 2 * (3 + 5)
    assert cache.shapes == {((2, 3), (2, 5))}
    bigger = cache.resized(5, 10)
    assert (bigger.shapes, bigger.num_layers, bigger.bytes_per_token) == (cache.shapes, 1, cache.bytes_per_token)


async def test_poisoned_request_leaves_no_poison_in_its_slot(loaded):
    """NaN behind the end of a sequence's own positions harms it even where the mask hides them."""
    poison = 299
    embedding = loaded.runner._model.get_input_embeddings().weight
    kept = embedding[poison].clone()
    prompts = [[5, 6, 7], [8 + number % 50 for number in range(100)]]
    expected = [generate_alone(loaded, prompt, 10) for prompt in prompts]
    embedding.data[poison] = float("nan")
    try:
        async with loaded.running() as engine:
            failures = [engine.submit(request([poison] * 90, GREEDY)) for _ in range(3)]
            outcomes = await asyncio.gather(*map(collect, failures), return_exceptions=True)
            got = await asyncio.gather(*(collect(engine.submit(request(prompt, GREEDY))) for prompt in prompts))
    finally:
        embedding.data[poison] = kept
    assert all(isinstance(outcome, Exception) for outcome in outcomes)
    assert [answer.token_ids for answer in got] == expected
