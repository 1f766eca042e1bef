"""The fallback, one request at a time: everything that batches can do, except batching."""

from __future__ import annotations

import asyncio
import gc

import pytest
import torch
from families import FAMILIES, save
from tiny import Answer, Loaded, collect, generate_alone, load, native, request

from serve.engine.alone import AloneForward
from serve.errors import GenerationFailed, OutOfMemory
from serve.types import SamplingParams

GREEDY = SamplingParams(max_tokens=16, temperature=0.0)


@pytest.fixture(scope="module", params=["Mamba", "Falcon"])
def loaded(request, tmp_path_factory) -> Loaded:
    torch.set_num_threads(1)
    family = next(family for family in FAMILIES if family.name == request.param)
    return load(
        save(tmp_path_factory.mktemp(request.param), family, tie_word_embeddings=False),
        chunk=16,
        slots=3,
        num_threads=1,
    )


def states(loaded: Loaded) -> int:
    assert loaded.runner._alone is not None
    gc.collect()
    return len(loaded.runner._alone._states)


async def test_fallback_says_so_with_the_reason(loaded):
    async with loaded.running() as engine:
        assert engine.batching is not None
        assert not engine.batching.enabled
        assert "runs one request at a time: it" in (engine.batching.reason or "")


async def test_fallback_arrivals_and_aborts_do_not_change_a_neighbour(loaded):
    prompts = [[5 + number] * length for number, length in enumerate((3, 20, 9, 33, 1, 17))]
    expected = [generate_alone(loaded, prompt, 16) for prompt in prompts]
    async with loaded.running() as engine:

        async def one(number: int) -> list[int] | None:
            await asyncio.sleep(0.01 * number)
            stream = engine.submit(request(prompts[number], GREEDY))
            if number % 3 == 1:
                await stream.next()
                stream.close()
                return None
            return (await collect(stream)).token_ids

        got = await asyncio.gather(*map(one, range(6)))
        for _ in range(200):  # what a sequence kept goes with it, in the engine's thread
            if not states(loaded):
                break
            await asyncio.sleep(0.01)
        assert not states(loaded)
    for number, token_ids in enumerate(got):
        assert token_ids is None or token_ids == expected[number]


async def test_fallback_streams_every_token_by_itself(loaded):
    async with loaded.running() as engine:
        events = [event async for arrived in engine.submit(request([5, 6], GREEDY)) for event in arrived]
    assert [event.token_id for event in events] == generate_alone(loaded, [5, 6], 16)


async def test_fallback_seed_is_equal_alone_and_in_company(loaded):
    seeded = SamplingParams(max_tokens=12, temperature=0.9, seed=7, top_p=0.9)
    async with loaded.running() as engine:
        alone = await collect(engine.submit(request([9, 8, 7], seeded)))
        others = [SamplingParams(max_tokens=12, temperature=1.5), GREEDY]
        streams = [engine.submit(request([9, 8, 7], params)) for params in (*others, seeded)]
        together = await asyncio.gather(*(collect(stream) for stream in streams))
    assert together[-1].token_ids == alone.token_ids
    assert together[0].token_ids != alone.token_ids


async def test_fallback_row_of_nan_fails_alone(loaded, monkeypatch):
    """Case 35, one request at a time."""
    expected, poison = generate_alone(loaded, [5, 6, 7], 16), 11
    run = AloneForward._run

    def poisoned(self, tokens, before, num_rows=1):
        logits, cache = run(self, tokens, before, num_rows)
        return logits * float("nan") if poison in tokens[:2] else logits, cache

    monkeypatch.setattr(AloneForward, "_run", poisoned)
    async with loaded.running() as engine:
        streams = [engine.submit(request(prompt, GREEDY)) for prompt in ([5, 6, 7], [poison, 5])]
        good, bad = await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)
    assert isinstance(good, Answer)
    assert good.token_ids == expected
    assert isinstance(bad, GenerationFailed)


async def test_fallback_goes_on_exactly_where_memory_ran_out(loaded, monkeypatch):
    """The first sequence has taken its token when the second one fails; the step is then tried again."""
    prompts = [[5] * 4, [6] * 11]
    expected = [generate_alone(loaded, prompt, 16) for prompt in prompts]
    passes, run = 0, AloneForward._run

    def failing(self, tokens, before, num_rows=1):
        nonlocal passes
        passes += 1
        result = run(self, tokens, before, num_rows)
        if passes == 6:
            raise torch.OutOfMemoryError("not enough memory")
        return result

    monkeypatch.setattr(AloneForward, "_run", failing)
    async with loaded.running() as engine:
        streams = [engine.submit(request(prompt, GREEDY)) for prompt in prompts]
        got = await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)
    assert isinstance(got[0], Answer)
    assert got[0].token_ids == expected[0]
    assert isinstance(got[1], OutOfMemory)


async def test_fallback_prompt_logprobs_are_those_of_one_pass(loaded):
    """The prompt comes in chunks, as everywhere; each must predict what the whole prompt would."""
    prompt = [3 + 7 * number % 290 for number in range(40)]
    params = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=0)
    async with loaded.running() as engine:
        events = [event async for arrived in engine.submit(request(prompt, params)) for event in arrived]
    first = events[0].prompt_logprobs
    assert first is not None
    assert first[0] is None
    got = [entry.logprob for entry in first[1:] if entry is not None]
    with torch.inference_mode():
        logits = native(loaded)(torch.tensor([prompt]), use_cache=False).logits[0].float()
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert got == pytest.approx(expected.tolist(), abs=1e-4)
    assert [event.token_id for event in events] == generate_alone(loaded, prompt, 2)
