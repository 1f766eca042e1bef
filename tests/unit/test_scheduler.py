"""Scheduler invariants, with hypothesis as the traffic."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.scheduler import Scheduler
from serve.types import FinishReason, GenerationRequest, SamplingParams

EOS = 0


def request(name: str, num_prompt_tokens: int = 3, max_tokens: int = 4) -> GenerationRequest:
    prompt = tuple(range(1, num_prompt_tokens + 1))
    return GenerationRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=max_tokens))


def scheduler(num_slots: int = 4, chunk: int = 8) -> Scheduler:
    return Scheduler(num_slots=num_slots, prefill_chunk_tokens=chunk, eos_token_ids=frozenset({EOS}))


class FakeCache:
    """What the KV cache would hold: for each slot the owner's tokens; moves copy them."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[list[tuple[str, int]]] = [[] for _ in range(num_slots)]

    def run(self, batch) -> None:
        for move in batch.moves:
            self.slots[move.target] = self.slots[move.source][: move.num_tokens]
        for sequence in batch.decodes:
            self.write(sequence, sequence.num_computed_tokens, 1)
        for chunk in batch.chunks:
            self.write(chunk.sequence, chunk.start, chunk.num_tokens)

    def write(self, sequence, start: int, count: int) -> None:
        name = sequence.request.request_id
        row = self.slots[sequence.slot]
        assert row[:start] == [(name, position) for position in range(start)], "reads another sequence's cache"
        row[start:] = [(name, position) for position in range(start, start + count)]


@st.composite
def traffic(draw):
    """Steps of arrivals, aborts and end-of-sequence draws."""
    count = draw(st.integers(1, 12))
    arrivals = [(draw(st.integers(0, 8)), draw(st.integers(1, 20)), draw(st.integers(1, 6))) for _ in range(count)]
    aborts = draw(st.dictionaries(st.integers(0, count - 1), st.integers(0, 12), max_size=4))
    stops = draw(st.lists(st.booleans(), min_size=40, max_size=40))
    return arrivals, aborts, stops


@settings(deadline=None, max_examples=200)
@given(traffic(), st.integers(1, 5), st.integers(1, 9))
def test_scheduler_finishes_every_request_once_and_never_shares_a_slot(case, num_slots, chunk):
    arrivals, aborts, stops = case
    subject, cache = scheduler(num_slots, chunk), FakeCache(num_slots)
    sequences, finished = {}, []
    for step in range(400):
        for number, (when, num_prompt, max_tokens) in enumerate(arrivals):
            if when == step:
                sequences[number] = subject.add(request(str(number), num_prompt, max_tokens))
        for number, when in aborts.items():
            if when == step and number in sequences and sequences[number].finish_reason is None:
                assert subject.abort(str(number)) is sequences[number]
                finished.append(number)
        subject.release()
        batch = subject.schedule()
        assert sum(part.num_tokens for part in batch.chunks) <= chunk
        occupied = [sequence.slot for sequence in (*subject.running, *subject.prefilling)]
        assert occupied == list(range(len(occupied))), "slots are not contiguous or not unique"
        assert len(occupied) <= num_slots
        cache.run(batch)
        drawn = [EOS if stops[(step + row) % 40] and step % 3 == 0 else 7 for row in range(len(batch.sampled))]
        subject.complete(batch, drawn)
        finished += [
            int(sequence.request.request_id) for sequence in batch.sampled if sequence.finish_reason is not None
        ]
        if step > 8 and not subject.has_work:
            break
    subject.release()
    assert not subject.has_work
    assert sorted(finished) == sorted(sequences), "a request was lost or ended twice"


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
