"""Scheduler invariants, with hypothesis as the traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.scheduler import MIN_AWAITED_TOKENS, Batch, Move, Scheduler, Sequence
from serve.types import FinishReason, GenerationRequest, SamplingParams

EOS = 0


def request(
    name: str, num_prompt_tokens: int = 3, max_tokens: int = 4, scope: str = "", prompt: tuple[int, ...] = ()
) -> GenerationRequest:
    prompt = prompt or tuple(range(1, num_prompt_tokens + 1))
    params = SamplingParams(max_tokens=max_tokens)
    return GenerationRequest(request_id=name, prompt_token_ids=prompt, params=params, cache_scope=scope)


def scheduler(num_slots: int = 4, chunk: int = 8, keeps_prefixes: bool = True) -> Scheduler:
    return Scheduler(
        num_slots=num_slots,
        prefill_chunk_tokens=chunk,
        eos_token_ids=frozenset({EOS}),
        keeps_prefixes=keeps_prefixes,
    )


class FakeCache:
    """What the KV cache would hold at each position: a hash of whose it is and of all tokens up to there."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[list[int]] = [[] for _ in range(num_slots)]

    def run(self, batch: Batch) -> None:
        for move in batch.moves:
            source, target = self.slots[move.source], self.slots[move.target]
            self.slots[move.target] = source[: move.num_tokens]
            if move.is_swap:
                self.slots[move.source] = target[: move.num_tokens]
        for sequence in batch.decodes:
            self.write(sequence, sequence.num_computed_tokens, 1)
        for chunk in batch.chunks:
            self.write(chunk.sequence, chunk.start, chunk.num_tokens)

    def write(self, sequence: Sequence, start: int, count: int) -> None:
        tokens = (*sequence.prompt_token_ids, *sequence.output_token_ids)
        own, seen = list[int](), hash(sequence.scope)
        for token in tokens[: start + count]:
            seen = hash((seen, token))
            own.append(seen)
        row = self.slots[sequence.slot]
        assert row[:start] == own[:start], "reads what it or a prefix of its own caller did not compute"
        row[start:] = own[start:]


@st.composite
def traffic(draw):
    """Steps of arrivals, aborts, failures and end-of-sequence draws; prompts begin alike, some go on alike."""
    count = draw(st.integers(1, 14))
    arrivals = []
    for number in range(count):
        family, length, tail = draw(st.tuples(st.integers(0, 1), st.integers(1, 110), st.integers(0, 2)))
        prompt = tuple(1 + family + position % 7 for position in range(length)) + (9,) * tail
        if arrivals and draw(st.booleans()):  # the next turn of a conversation
            earlier = arrivals[draw(st.integers(0, number - 1))]
            prompt = (*earlier[1], 7, 7, *prompt[:20])
        when, max_tokens, scope = draw(st.tuples(st.integers(0, 25), st.integers(1, 6), st.sampled_from("aab")))
        arrivals.append((when, prompt, max_tokens, scope))
    events = st.dictionaries(st.integers(0, count - 1), st.tuples(st.integers(0, 30), st.booleans()), max_size=5)
    stops = draw(st.lists(st.booleans(), min_size=40, max_size=40))
    return arrivals, draw(events), stops


@settings(deadline=None, max_examples=200)
@given(traffic(), st.integers(1, 5), st.integers(5, 60), st.booleans())
def test_scheduler_finishes_every_request_once_and_never_reads_what_is_not_its_own(case, num_slots, chunk, keeps):
    arrivals, ends, stops = case
    subject, cache = scheduler(num_slots, chunk, keeps), FakeCache(num_slots)
    sequences, finished = {}, []
    for step in range(900):
        for number, (when, prompt, max_tokens, scope) in enumerate(arrivals):
            if when == step:
                sequences[number] = subject.add(request(str(number), 0, max_tokens, scope, prompt))
        for number, (when, is_failure) in ends.items():
            if when == step and number in sequences and sequences[number].finish_reason is None:
                assert subject.abort(str(number)) is sequences[number]
                if is_failure:
                    sequences[number].finish_reason = FinishReason.ERROR
                finished.append(number)
        subject.release()
        batch = subject.schedule()
        check_step(subject, batch, chunk, num_slots)
        cache.run(batch)
        drawn = [EOS if stops[(step + row) % 40] and step % 3 == 0 else 7 for row in range(len(batch.sampled))]
        subject.complete(batch, drawn)
        finished += [
            int(sequence.request.request_id) for sequence in batch.sampled if sequence.finish_reason is not None
        ]
        if step > 25 and not subject.has_work:
            break
    subject.release()
    assert not subject.has_work
    assert sorted(finished) == sorted(sequences), "a request was lost or ended twice"
    for sequence in sequences.values():
        assert sequence.num_cached_tokens < len(sequence.prompt_token_ids), "a prompt without logits"
        assert keeps or not sequence.num_cached_tokens


def check_step(subject: Scheduler, batch: Batch, chunk: int, num_slots: int) -> None:
    assert batch.num_prompt_tokens <= chunk
    assert batch.chunks or batch.decodes or not subject.has_work, "there is work, but nothing runs"
    assert [sequence.slot for sequence in subject.running] == list(range(len(subject.running))), "slots have gaps"
    owned = [sequence.slot for sequence in (*subject.running, *subject.prefilling)]
    assert len(set(owned)) == len(owned), "a slot is owned twice"
    assert all(0 <= slot < num_slots for slot in owned)
    assert all(part.num_tokens > 0 for part in batch.chunks)


def serve(subject: Scheduler, *requests: GenerationRequest, token: int = 5) -> list[Sequence]:
    """Run requests to their end, all at once."""
    sequences = [subject.add(each) for each in requests]
    while subject.has_work:
        batch = subject.schedule()
        subject.complete(batch, [token] * len(batch.sampled))
        subject.release()
    return sequences


def test_next_turn_of_a_conversation_computes_only_what_is_new():
    subject = scheduler(chunk=64)
    (first,) = serve(subject, request("first", 40, max_tokens=5))
    prompt = (*first.prompt_token_ids, *first.output_token_ids, 8, 8)
    (second,) = serve(subject, request("second", prompt=prompt))
    # The last token that was drawn was never fed to the model.
    assert second.usage.cached_tokens == second.num_cached_tokens == 44


def test_repeated_prompt_leaves_one_token_to_compute():
    subject = scheduler(chunk=64)
    serve(subject, request("first", 40))
    assert serve(subject, request("again", 40))[0].num_cached_tokens == 39


def test_prefix_is_never_shared_across_scopes():
    subject = scheduler(chunk=64)
    serve(subject, request("mine", 40, scope="a"))
    assert serve(subject, request("yours", 40, scope="b"))[0].num_cached_tokens == 0
    assert serve(subject, request("mine again", 40, scope="a"))[0].num_cached_tokens == 39


def test_prompt_logprobs_need_the_whole_prompt():
    subject = scheduler(chunk=64)
    serve(subject, request("first", 40))
    again = request("again", 40)
    again = replace(again, params=replace(again.params, prompt_logprobs=0))
    assert serve(subject, again)[0].num_cached_tokens == 0


def test_failed_request_leaves_nothing_behind():
    subject = scheduler(chunk=64)
    failed = subject.add(request("failed", 40))
    subject.complete(subject.schedule(), [5])
    failed.finish_reason = FinishReason.ERROR
    subject.release()
    after = subject.add(request("after", 40))
    assert subject.schedule().moves == ()
    assert after.num_cached_tokens == 0


def test_oldest_prefix_gives_way_first():
    subject = scheduler(num_slots=2, chunk=64)
    for name, first_token in (("a", 100), ("b", 200), ("c", 300)):
        serve(subject, request(name, prompt=tuple(range(first_token, first_token + 40))))
    cached = [
        serve(subject, request(f"{start}", prompt=(*range(start, start + 40), 1)))[0].num_cached_tokens
        for start in (200, 300)
    ]
    assert cached == [40, 40]


def test_prompts_that_begin_alike_and_come_together_are_computed_once():
    subject = scheduler(chunk=128)
    common = tuple(range(1, 301))
    sequences = serve(subject, *(request(str(number), prompt=(*common, 500 + number)) for number in range(4)))
    assert sequences[0].num_cached_tokens == 0
    assert all(sequence.num_cached_tokens > 300 - MIN_AWAITED_TOKENS for sequence in sequences[1:])


def test_prefix_of_a_running_sequence_is_copied_and_leaves_it_alone():
    subject, cache = scheduler(chunk=64), FakeCache(4)
    subject.add(request("first", 40, max_tokens=9))
    batch = subject.schedule()
    cache.run(batch)
    subject.complete(batch, [5])
    second = subject.add(request("second", 45))
    batch = subject.schedule()
    assert batch.moves == (Move(0, 1, 40),)
    cache.run(batch)
    assert second.num_cached_tokens == 40


def test_scheduler_admits_in_order_of_arrival():
    subject = scheduler(num_slots=2)
    for name in "abc":
        subject.add(request(name))
    batch = subject.schedule()
    assert [chunk.sequence.request.request_id for chunk in batch.chunks] == ["a", "b"]
    assert [sequence.request.request_id for sequence in subject.waiting] == ["c"]


def test_scheduler_splits_a_long_prompt_and_keeps_decoding():
    subject = scheduler(chunk=4)
    subject.add(request("short", num_prompt_tokens=2, max_tokens=9))
    subject.complete(subject.schedule(), [5])
    subject.add(request("long", num_prompt_tokens=10))
    sizes = []
    for _ in range(3):
        batch = subject.schedule()
        assert [sequence.request.request_id for sequence in batch.decodes] == ["short"]
        sizes.append(batch.chunks[0].num_tokens)
        subject.complete(batch, [5] * len(batch.sampled))
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize(("token", "reason"), [(EOS, FinishReason.STOP), (7, FinishReason.LENGTH)])
def test_scheduler_says_why_a_sequence_ended(token, reason):
    subject = scheduler()
    sequence = subject.add(request("a", max_tokens=1))
    subject.complete(subject.schedule(), [token])
    assert sequence.finish_reason is reason
    assert sequence.usage.completion_tokens == 1


def test_scheduler_drops_an_aborted_request_that_still_waits():
    subject = scheduler(num_slots=1)
    subject.add(request("running"))
    waiting = subject.add(request("waiting"))
    subject.schedule()
    subject.abort("waiting")
    subject.release()
    assert not subject.waiting
    assert waiting.finish_reason is FinishReason.ABORT
    assert subject.abort("unknown") is None
