"""The engine against transformers itself: batched output is what each request gets alone."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from tiny import Answer, Loaded, Ready, collect, generate_alone, load, next_logits, request, tiny_llama

from serve.engine.base import EngineConfig
from serve.engine.worker import StepEngine
from serve.errors import ContextLengthExceeded
from serve.types import FinishReason, SamplingParams

TOPICS = ["a fox", "a lighthouse keeper", "a robot", "Mars", "two chess players"]


def prompts_for(loaded: Loaded, count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of very different lengths."""
    draw = random.Random(seed)
    return [[draw.randrange(3, loaded.vocab_size) for _ in range(draw.choice((1, 5, 40, 90)))] for _ in range(count)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    return load(tiny_llama(tmp_path_factory.mktemp("llama")), chunk=16, slots=4)


@pytest.fixture(scope="module")
def smollm2(demo_model) -> Loaded:
    return load(demo_model, chunk=64, slots=8)


async def test_batched_greedy_equals_generate_alone(loaded):
    prompts = prompts_for(loaded, 9)
    expected = [generate_alone(loaded, prompt, 20) for prompt in prompts]
    async with loaded.running() as engine:
        greedy = SamplingParams(max_tokens=20, temperature=0.0)
        streams = [engine.submit(request(prompt, greedy)) for prompt in prompts]
        got = await asyncio.gather(*(collect(stream) for stream in streams))
    assert [answer.token_ids for answer in got] == expected


async def test_smollm2_batched_greedy_equals_generate_alone_in_float32(smollm2):
    chats = [[{"role": "user", "content": f"Write a story about {topic}."}] for topic in TOPICS]
    prompts = [list(smollm2.chat.prompt(messages)) for messages in chats]
    expected = [generate_alone(smollm2, prompt, 10) for prompt in prompts]
    async with smollm2.running() as engine:
        streams = [engine.submit(request(prompt, SamplingParams(max_tokens=10, temperature=0.0))) for prompt in prompts]
        got = await asyncio.gather(*(collect(stream) for stream in streams))
    assert [answer.token_ids for answer in got] == expected
    decode = smollm2.files.decode
    assert [answer.text for answer in got] == [decode(token_ids).removesuffix("\ufffd") for token_ids in expected]


async def test_arrivals_and_aborts_do_not_change_a_neighbour(loaded):
    prompts = prompts_for(loaded, 12, seed=1)
    expected = [generate_alone(loaded, prompt, 16) for prompt in prompts]
    async with loaded.running() as engine:
        greedy = SamplingParams(max_tokens=16, temperature=0.0)

        async def one(number: int) -> list[int] | None:
            await asyncio.sleep(0.003 * number)
            stream = engine.submit(request(prompts[number], greedy))
            if number % 3 == 1:
                await stream.next()
                stream.close()
                return None
            return (await collect(stream)).token_ids

        got = await asyncio.gather(*map(one, range(12)))
        assert engine.stats().num_waiting == 0
    for number, token_ids in enumerate(got):
        assert token_ids is None or token_ids == expected[number]


@pytest.mark.parametrize("params", [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9}, {"min_p": 0.02}])
async def test_seeded_output_is_equal_alone_and_in_any_batch(loaded, params):
    prompt = prompts_for(loaded, 1, seed=2)[0]
    seeded = SamplingParams(max_tokens=12, temperature=0.9, seed=7, **params)
    async with loaded.running() as engine:
        alone = await collect(engine.submit(request(prompt, seeded)))
        others = [
            SamplingParams(max_tokens=12, temperature=t, top_p=p) for t, p in ((1.5, 1.0), (0.7, 0.5), (0.0, 1.0))
        ]
        streams = [engine.submit(request(prompt, params)) for params in (*others, seeded)]
        answers = await asyncio.gather(*(collect(stream) for stream in streams))
    assert answers[-1].token_ids == alone.token_ids
    assert answers[0].token_ids != alone.token_ids


async def test_unseeded_requests_differ(loaded):
    async with loaded.running() as engine:
        params = SamplingParams(max_tokens=12, temperature=2.0)
        answers = [await collect(engine.submit(request([5, 6], params))) for _ in range(2)]
    assert answers[0].token_ids != answers[1].token_ids


async def test_usage_and_reason_when_max_tokens_ends_a_request(loaded):
    async with loaded.running() as engine:
        answer = await collect(engine.submit(request([9, 8, 7], SamplingParams(max_tokens=3, temperature=0.0))))
    assert answer.finish_reason is FinishReason.LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 3)


async def test_request_beyond_its_slot_is_refused_by_the_engine_too(loaded):
    async with loaded.running() as engine:
        stream = engine.submit(request([5] * 10, SamplingParams(max_tokens=loaded.max_model_len)))
        with pytest.raises(ContextLengthExceeded, match=str(loaded.max_model_len)):
            await collect(stream)


async def test_row_of_nan_fails_alone(loaded):
    """Case 35: the poisoned request ends with an error, its batch mates as if it were not there."""
    prompts = prompts_for(loaded, 3, seed=3)
    expected = [generate_alone(loaded, prompt, 8) for prompt in prompts]
    poison = loaded.vocab_size - 1
    embedding = loaded.runner._model.get_input_embeddings().weight
    kept = embedding[poison].clone()
    embedding.data[poison] = float("nan")
    try:
        async with loaded.running() as engine:
            greedy = SamplingParams(max_tokens=8, temperature=0.0)
            streams = [engine.submit(request(prompt, greedy)) for prompt in [*prompts, [poison, 5]]]
            got = await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)
    finally:
        embedding.data[poison] = kept
    assert [answer.token_ids for answer in got[:3] if isinstance(answer, Answer)] == expected
    assert type(got[3]).__name__ == "GenerationFailed"


async def test_step_that_raises_ends_every_request_with_engine_dead(loaded, monkeypatch):
    deaths = []

    def break_down(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(loaded.runner, "_forward", break_down)
    async with loaded.running(deaths) as engine:
        stream = engine.submit(request([5], SamplingParams(max_tokens=8)))
        with pytest.raises(Exception, match="engine stopped"):
            await collect(stream)
    assert len(deaths) == 1


async def test_smollm2_in_bfloat16_leaves_generate_only_where_two_tokens_nearly_tie(demo_model, record_property):
    """bfloat16 has steps of 1/8 at these logits, so two best tokens often tie; then either may be taken."""
    is_quick = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # other CPUs imitate it, forty times slower
    topics, max_tokens = (TOPICS, 12) if is_quick else (TOPICS[:3], 8)
    loaded = load(demo_model, chunk=64, slots=8, dtype="bfloat16")
    assert loaded.chat is not None
    chats = [[{"role": "user", "content": f"Write a story about {topic}."}] for topic in topics]
    prompts = [list(loaded.chat.prompt(messages)) for messages in chats]
    expected = [generate_alone(loaded, prompt, max_tokens) for prompt in prompts]
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    async with loaded.running() as engine:
        streams = [engine.submit(request(prompt, greedy)) for prompt in prompts]
        got = [answer.token_ids for answer in await asyncio.gather(*(collect(stream) for stream in streams))]
    gaps = {}
    for number, (prompt, ours, theirs) in enumerate(zip(prompts, got, expected, strict=True)):
        common = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if common is not None:
            logits = next_logits(loaded, prompt + theirs[:common])
            gaps[number] = float(logits[theirs[common]] - logits[ours[common]])
    record_property("bfloat16_splits", gaps)
    assert all(0 <= gap <= 0.25 for gap in gaps.values()), gaps


def test_engine_refuses_to_start_before_load(loaded):
    engine = StepEngine(EngineConfig(), Ready(loaded.runner))
    with pytest.raises(RuntimeError, match="load"):
        engine.start(print)


async def test_what_a_poisoned_request_left_in_its_slot_hurts_nobody(loaded):
    """Case 35, afterwards: a batch reads every slot up to its longest sequence, and 0 times NaN is NaN."""
    prompts = [[7] * 60, [8] * 3]
    expected = [generate_alone(loaded, prompt, 24) for prompt in prompts]
    poison = loaded.vocab_size - 1
    embedding = loaded.runner._model.get_input_embeddings().weight
    kept = embedding[poison].clone()
    greedy = SamplingParams(max_tokens=24, temperature=0.0)
    async with loaded.running() as engine:
        embedding.data[poison] = float("nan")
        poisoned = [engine.submit(request([poison] * 50, greedy)) for _ in range(4)]
        await asyncio.gather(*(collect(stream) for stream in poisoned), return_exceptions=True)
        embedding.data[poison] = kept
        streams = [engine.submit(request(prompt, greedy)) for prompt in prompts]
        got = await asyncio.gather(*(collect(stream) for stream in streams))
    assert [answer.token_ids for answer in got] == expected
