"""One request's events: log-probabilities keep step with the text, a grammar ends it, failures are its own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.live import LiveRequest
from serve.engine.scheduler import Sequence
from serve.errors import GenerationFailed
from serve.types import FinishReason, GenerationRequest, SamplingParams, TokenEvent, TokenLogprob

EOS = 999


def live(decode: Any = None, *, grammar: Any = None, **params: Any) -> LiveRequest:
    made = SamplingParams(**{"max_tokens": 99, "logprobs": 0, **params})
    request = GenerationRequest(request_id="r", prompt_token_ids=(1, 2), params=made)
    sequence = Sequence(request, end_token_ids=frozenset({EOS}), grammar=grammar)
    return LiveRequest(sequence, decode or (lambda ids: bytes(ids).decode("utf-8", errors="replace")), 0.0)


def run(subject: LiveRequest, tokens: list[int]) -> list[TokenEvent]:
    """As the worker does: the scheduler's reasons first, then the event."""
    events: list[TokenEvent] = []
    sequence = subject.sequence
    for token in tokens:
        sequence.output_token_ids.append(token)
        if token in sequence.end_token_ids:
            sequence.finish_reason = FinishReason.STOP
        elif len(sequence.output_token_ids) == sequence.params.max_tokens:
            sequence.finish_reason = FinishReason.LENGTH
        events.append(subject.event(token, TokenLogprob(token, -1.0)))
        if sequence.finish_reason is not None:
            break
    return events


def named(events: list[TokenEvent]) -> list[int]:
    return [logprob.token_id for event in events for logprob in event.logprobs]


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


@given(st.text("ab,é🫠", max_size=20), st.lists(st.text("ab,é", min_size=1, max_size=3), max_size=2))
def test_logprobs_are_of_the_tokens_of_the_returned_text(text, stop):
    tokens = list(text.encode())
    events = run(live(stop=tuple(stop)), [*tokens, EOS])
    returned = list(text_of(events).encode())
    assert named(events) == tokens[: len(returned)] == returned
    seen: list[int] = []
    for number, event in enumerate(events):
        seen += [logprob.token_id for logprob in event.logprobs]
        assert len(seen) >= len(text_of(events[: number + 1]).encode()), "text left before its log-probabilities"


def test_token_that_only_begins_before_a_stop_string_is_named():
    def decode(ids: Any) -> str:
        return "".join(("one", " tw", "o, th", "ree")[token_id] for token_id in ids)

    events = run(live(decode, stop=("o, t",)), [0, 1, 2, 3])
    assert text_of(events) == "one tw"
    assert named(events) == [0, 1]
    events = run(live(decode, stop=(", t",)), [0, 1, 2, 3])
    assert text_of(events) == "one two"
    assert named(events) == [0, 1, 2]


def test_every_token_is_named_at_a_limit_even_half_a_character():
    events = run(live(max_tokens=3), [*"a🫠".encode()])
    assert text_of(events) == "a"
    assert named(events) == [*"a🫠".encode()[:3]]
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_tokens_without_text_are_named_at_once():
    events = run(live(lambda ids: "x" * sum(token_id == 7 for token_id in ids)), [7, 8, 8, 7])
    assert [len(event.logprobs) for event in events] == [1, 1, 1, 1]


def test_first_event_alone_carries_queue_time_and_prompt():
    subject = live(prompt_logprobs=0)
    subject.begin(1.5)
    subject.begin(9.0)
    subject.add_prompt_logprobs([TokenLogprob(2, -0.5)])
    first, second = run(subject, [97, 98])
    assert (first.queue_s, second.queue_s) == (1.5, None)
    assert first.prompt_logprobs == (None, TokenLogprob(2, -0.5))
    assert second.prompt_logprobs is None


class Script:
    """A grammar that is finished after some tokens, or raises at one."""

    def __init__(self, num_tokens: int, bad: int = -1) -> None:
        self._left, self._bad = num_tokens, bad
        self.taken: list[int] = []

    @property
    def is_finished(self) -> bool:
        return self._left == 0

    def allowed(self) -> bytes:
        return b""

    def accept(self, token_id: int) -> None:
        if token_id == self._bad:
            raise ValueError("the words of a user")
        self.taken.append(token_id)
        self._left -= 1


def test_finished_grammar_ends_the_request_with_its_last_text():
    events = run(live(grammar=Script(2)), [97, 98, 99])
    assert text_of(events) == "ab"
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 2


def test_grammar_that_finishes_at_the_limit_is_a_stop():
    assert run(live(grammar=Script(2), max_tokens=2), [97, 98])[-1].finish_reason is FinishReason.STOP
    assert run(live(grammar=Script(3), max_tokens=2), [97, 98])[-1].finish_reason is FinishReason.LENGTH


def test_grammar_does_not_see_the_token_that_ended_the_sequence():
    grammar = Script(9)
    run(live(grammar=grammar), [97, EOS])
    assert grammar.taken == [97]


def test_grammar_or_decoder_that_raises_fails_the_request_without_its_words(caplog):
    with pytest.raises(GenerationFailed, match="constraint"):
        run(live(grammar=Script(9, bad=98)), [97, 98])

    def broken(ids: Any) -> str:
        raise RuntimeError("the words of a user")

    with pytest.raises(GenerationFailed, match="decoded"):
        run(live(broken), [97])
    assert "words" not in caplog.text
