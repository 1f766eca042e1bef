"""Turns, shares and budgets: no caller and no running stream waits because of somebody else's flood."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.base import EngineConfig
from serve.engine.budget import MAX_STRETCH, MIN_TOKENS, PROMPT_LOGPROB_TOKENS, PrefillBudget, share
from serve.engine.echo import EchoEngine
from serve.engine.scheduler import Batch, Chunk, Scheduler, Sequence
from serve.engine.turns import FairQueue
from serve.errors import QueueFull
from serve.types import FinishReason, GenerationRequest, SamplingParams


def sequence(scope: str, num_prompt_tokens: int = 10, prompt_logprobs: int | None = None) -> Sequence:
    params = SamplingParams(max_tokens=4, prompt_logprobs=prompt_logprobs)
    prompt = tuple(range(num_prompt_tokens))
    return Sequence(GenerationRequest(request_id="r", prompt_token_ids=prompt, params=params, cache_scope=scope))


@given(st.lists(st.sampled_from("abc") | st.none(), max_size=60))
def test_nobody_is_passed_over_twice(actions):
    """Letters arrive, None takes: while a caller waits, every other one gets at most one turn."""
    queue, waiting, passed = FairQueue(), {scope: list[Sequence]() for scope in "abc"}, dict.fromkeys("abc", "")
    for scope in actions:
        if scope is not None:
            waiting[scope].append(sequence(scope))
            queue.add(waiting[scope][-1])
            continue
        taken = queue.pop(lambda _: True)
        assert (taken is None) == (not any(waiting.values()))
        if taken is None:
            continue
        assert waiting[taken.scope].pop(0) is taken, "a caller's own order changed"
        passed[taken.scope] = ""
        for other in "abc":
            if waiting[other] and other != taken.scope:
                assert taken.scope not in passed[other], f"{taken.scope} had two turns while {other} waited"
                passed[other] += taken.scope
    assert len(queue) == sum(map(len, waiting.values()))


def test_queue_skips_who_is_not_ready_and_forgets_who_ended():
    queue = FairQueue()
    first, second, third = sequence("a"), sequence("b"), sequence("b")
    for each in (first, second, third):
        queue.add(each)
    assert queue.pop(lambda each: each is not first) is second
    third.finish_reason = FinishReason.ABORT
    queue.drop_ended()
    assert list(queue) == [first]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 300), st.booleans()), min_size=1, max_size=10),
    st.integers(1, 600),
)
def test_share_is_even_among_callers_and_leaves_nothing_unused(prompts, budget):
    sequences = [sequence(scope, size, 0 if asks else None) for scope, size, asks in prompts]
    chunks = share(sequences, budget)
    need = {
        each: min(len(each.prompt_token_ids), PROMPT_LOGPROB_TOKENS)
        if each.params.prompt_logprobs is not None
        else len(each.prompt_token_ids)
        for each in sequences
    }
    assert sum(chunk.num_tokens for chunk in chunks) == min(budget, sum(need.values()))
    assert all(0 < chunk.num_tokens <= need[chunk.sequence] for chunk in chunks)
    scopes = {each.scope for each in sequences}
    for scope in scopes:
        wanted = sum(need[each] for each in sequences if each.scope == scope)
        got = sum(chunk.num_tokens for chunk in chunks if chunk.sequence.scope == scope)
        assert got >= min(wanted, budget // len(scopes)), "a caller got less than an even share"


def test_short_prompt_is_not_held_up_by_a_long_one_of_the_same_caller():
    long, short = sequence("a", 6000), sequence("a", 50)
    granted = {chunk.sequence: chunk.num_tokens for chunk in share([long, short], 100)}
    assert granted[short] == 50
    assert granted[long] == 50
    assert {chunk.sequence: chunk.num_tokens for chunk in share([long, sequence("a", 500)], 100)}[long] == 25


def test_flood_of_one_caller_delays_another_by_one_slot_at_most():
    subject = Scheduler(num_slots=3, prefill_chunk_tokens=64, eos_token_ids=frozenset(), keeps_prefixes=True)
    for number in range(50):
        subject.add(_request(f"flood{number}", "flood", 40, max_tokens=20))
    for _ in range(5):
        _step(subject)
    mine = subject.add(_request("mine", "mine", 10, max_tokens=2))
    freed = False
    for _ in range(40):
        freed = freed or any(each.finish_reason for each in subject.running)
        _step(subject)
        if freed:
            break
    assert mine.slot >= 0, "a slot was freed, and the flood took it"


def _request(name: str, scope: str, num_prompt_tokens: int, max_tokens: int) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens)
    start = sum(name.encode())
    prompt = tuple(range(start, start + num_prompt_tokens))
    return GenerationRequest(request_id=name, prompt_token_ids=prompt, params=params, cache_scope=scope)


def _step(subject: Scheduler) -> None:
    subject.release()
    batch = subject.schedule()
    subject.complete(batch, [7] * len(batch.sampled))


def batch(num_tokens: int, is_decoding: bool) -> Batch:
    own = sequence("a")
    return Batch((), (own,) if is_decoding else (), (Chunk(own, 0, num_tokens),) if num_tokens else ())


@given(st.floats(0.001, 1.0), st.floats(1e-5, 0.05), st.integers(1, 4096), st.floats(0.001, 2.0))
def test_step_with_prompts_stays_within_the_gap_or_a_few_steps_without(decode_s, token_s, most, gap_s):
    subject = PrefillBudget(most, gap_s)
    assert subject.tokens(is_decoding=False) == most
    assert subject.tokens(is_decoding=True) <= most
    for _ in range(60):
        subject.learn(batch(0, is_decoding=True), decode_s)
        num_tokens = subject.tokens(is_decoding=True)
        subject.learn(batch(num_tokens, is_decoding=True), decode_s + token_s * num_tokens)
    num_tokens = subject.tokens(is_decoding=True)
    assert num_tokens <= most
    allowed_s = max(decode_s * MAX_STRETCH, gap_s) * 1.01
    assert num_tokens == min(MIN_TOKENS, most) or decode_s + token_s * num_tokens <= allowed_s
    fits_more = decode_s + token_s * (num_tokens + 2) <= allowed_s * 0.98
    assert num_tokens == most or most < MIN_TOKENS or not fits_more, "takes less than it could"


def test_step_that_does_not_fit_into_memory_is_halved_and_grows_back():
    subject = PrefillBudget(512, 0.2)
    sizes = []
    while subject.shrink():
        sizes.append(subject.tokens(is_decoding=False))
    assert sizes == [256, 128, 64, 32, 16]
    for _ in range(100):
        subject.learn(batch(32, is_decoding=False), 0.01)
    assert subject.tokens(is_decoding=False) == 512


def test_caller_who_has_nothing_here_gets_one_place_in_a_full_queue():
    engine = EchoEngine(EngineConfig(max_queue=2))
    for number in range(2):
        engine.submit(_request(f"flood{number}", "flood", 5, max_tokens=2))
    with pytest.raises(QueueFull):
        engine.submit(_request("flood2", "flood", 5, max_tokens=2))
    engine.submit(_request("first", "other", 5, max_tokens=2))
    with pytest.raises(QueueFull):
        engine.submit(_request("second", "other", 5, max_tokens=2))
