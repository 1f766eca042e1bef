"""The overlapped step loop against the one that reads each step at once, over a runner without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.base import EngineConfig, ModelFiles, StepOutput
from serve.engine.commands import Abort, Add
from serve.engine.pulse import Pulse
from serve.engine.scheduler import Batch, Sequence
from serve.engine.steps import Steps
from serve.errors import OutOfMemory
from serve.types import FinishReason, GenerationRequest, SamplingParams, TokenEvent, TokenLogprob

EOS, POISON, VOCAB = 0, 1, 26
CHUNK = 12


class Recorded:
    """Draws each next token from a hash of the sequence's own tokens, which it reads out of a cache of its own.

    Its device keeps the tokens of a launched step to itself until they are read; nothing else here may use them.
    """

    alone_reason: str | None = None
    keeps_prefixes = True
    vocab_size = VOCAB
    max_model_len = 80

    def __init__(self, num_slots: int, *, overlaps: bool, full_at: frozenset[int] = frozenset()) -> None:
        self.num_slots, self.overlaps = num_slots, overlaps
        self.num_ahead = self.num_launched = 0
        self._full_at = full_at
        self._cache: list[list[int]] = [[] for _ in range(num_slots)]
        self._drawn: dict[Sequence, int] = {}
        self._unread = 0

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        self._move(batch)
        self.num_launched += 1
        if self.num_launched in self._full_at:
            raise OutOfMemory("full")
        assert self._unread <= 1, "more than one step ahead"
        self.num_ahead += self._unread
        assert batch.decodes or batch.chunks, "a step of nothing"
        assert [each.slot for each in batch.decodes] == list(range(len(batch.decodes))), "slots have gaps"
        for each in batch.decodes:
            token = self._drawn[each] if each.num_pending_tokens else each.output_token_ids[-1]
            self._write(each, each.num_computed_tokens, [token])
        for chunk in batch.chunks:
            tokens = chunk.sequence.prompt_token_ids[chunk.start : chunk.start + chunk.num_tokens]
            self._write(chunk.sequence, chunk.start, [*tokens])
        self._drawn = {each: self._next(each) for each in batch.sampled}
        drawn = [None if POISON in self._cache[each.slot] else token for each, token in self._drawn.items()]
        logprobs = {
            row: TokenLogprob(token or 0, 0.0)
            for row, (each, token) in enumerate(self._drawn.items())
            if each.params.logprobs is not None
        }
        self._unread += 1

        def read() -> StepOutput:
            self._unread -= 1
            return StepOutput(drawn, logprobs=logprobs)

        return read

    def _move(self, batch: Batch) -> None:
        for move in batch.moves:
            source, target = self._cache[move.source], self._cache[move.target]
            self._cache[move.target] = source[: move.num_tokens]
            if move.is_swap:
                self._cache[move.source] = target[: move.num_tokens]

    def _write(self, sequence: Sequence, start: int, tokens: list[int]) -> None:
        row = self._cache[sequence.slot]
        known = (*sequence.prompt_token_ids, *sequence.output_token_ids)
        assert len(row) >= start, "keys are missing"
        assert row[: min(start, len(known))] == [*known[:start]], "keys of others"
        assert start + len(tokens) <= self.max_model_len, "beyond the slot"
        row[start:] = tokens

    def _next(self, sequence: Sequence) -> int:
        if sequence.grammar is not None:
            assert not sequence.num_pending_tokens, "a mask from an unknown token"
            return next(bit for bit in range(VOCAB) if sequence.grammar.allowed()[bit // 8] >> bit % 8 & 1)
        seed, place = sequence.params.seed or 0, sequence.num_drawn_tokens
        token = 2 + hash((seed, place, *self._cache[sequence.slot])) % (VOCAB - 2)
        return EOS if token % 9 == 0 and not sequence.awaits_min_tokens else token


class Upwards:
    """A grammar in which each token is the one after the last, up to five."""

    def __init__(self) -> None:
        self._last = 2

    @property
    def is_finished(self) -> bool:
        return self._last == 7

    def allowed(self) -> bytes:
        return (1 << self._last + 1).to_bytes(4, "little")

    def accept(self, token_id: int) -> None:
        assert token_id == self._last + 1
        self._last = token_id


def spelled(token_ids: Any) -> str:
    return "".join(chr(ord("a") + token_id) for token_id in token_ids if token_id != EOS)


@st.composite
def requests(draw: Any) -> GenerationRequest:
    length, kind = draw(st.tuples(st.integers(1, 40), st.integers(2, 4)))
    prompt = [kind + place % 5 for place in range(length)]
    if draw(st.integers(0, 7)) == 0:
        prompt[-1] = POISON
    params = SamplingParams(
        max_tokens=draw(st.sampled_from((1, 2, 5, 12, None))),
        seed=draw(st.integers(0, 3)),
        stop=draw(st.sampled_from(((), ("c",), ("gh", "k")))),
        min_tokens=draw(st.sampled_from((0, 0, 3))),
        logprobs=draw(st.sampled_from((None, 0))),
        grammar=Upwards if draw(st.integers(0, 7)) == 0 else None,
    )
    return GenerationRequest(
        request_id="", prompt_token_ids=tuple(prompt), params=params, cache_scope=draw(st.sampled_from("ab"))
    )


Case = list[tuple[int, GenerationRequest, int | None]]
"""In which turn each request comes, and after which of its events it is cancelled."""


def run(case: Case, runner: Any) -> tuple[dict[str, list[TokenEvent]], Steps, Pulse]:
    files = ModelFiles(
        folder=Path(), decode=spelled, eos_token_ids=frozenset({EOS, VOCAB + 5}), max_model_len=runner.max_model_len
    )
    pulse = Pulse()
    steps = Steps(EngineConfig(prefill_chunk_tokens=CHUNK), runner, files, pulse)
    told: dict[str, list[TokenEvent]] = {}
    cancels: dict[str, int | None] = {}
    for turn in range(5000):
        for number, (when, request, cancel) in enumerate(case):
            if when == turn:
                name = f"{number}"
                told[name], cancels[name] = [], cancel
                object.__setattr__(request, "request_id", name)
                steps.obey(Add(request, 0.0))
        if not steps.has_work and turn > max(when for when, _, _ in case):
            return told, steps, pulse
        for name, event in steps.turn() if steps.has_work else ():
            told[name].append(event)
            if len(told[name]) == cancels[name]:
                steps.obey(Abort(name))
    raise AssertionError("it never ends")


def seen(events: list[TokenEvent]) -> list[Any]:
    """Of each event what must be equal; how much was cached depends on who was there at the same time."""
    return [
        (
            each.text,
            each.token_id,
            each.finish_reason,
            each.stop,
            each.usage and (each.usage.prompt_tokens, each.usage.completion_tokens),
            each.logprobs,
            each.end_logprob,
            type(each.error),
        )
        for each in events
    ]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 12), requests(), st.none() | st.integers(1, 6)), min_size=1, max_size=9),
    st.integers(1, 4),
    st.frozensets(st.integers(2, 30), max_size=3),
)
def test_overlapped_steps_tell_every_request_what_steps_read_at_once_tell(case, num_slots, full_at):
    """Any mix: ends and stop strings at any step, cancels, failed rows, grammars, prefixes, few slots, full memory."""
    plain, _, _ = run(case, Recorded(num_slots, overlaps=False))
    overlapped = Recorded(num_slots, overlaps=True, full_at=full_at)
    got, steps, pulse = run(case, overlapped)
    for name, events in plain.items():
        if any(isinstance(event.error, OutOfMemory) for event in got[name]):
            assert seen(got[name][:-1]) == seen(events)[: len(got[name]) - 1]
        else:
            assert seen(got[name]) == seen(events)
    assert not steps.num_running, "a slot is never given back"
    assert not steps._live
    assert pulse.num_bad_steps <= sum(POISON in request.prompt_token_ids for _, request, _ in case)


def request(prompt: tuple[int, ...], **params: Any) -> GenerationRequest:
    return GenerationRequest(request_id="", prompt_token_ids=prompt, params=SamplingParams(**params))


def test_steps_are_launched_ahead_and_none_for_requests_whose_length_is_reached():
    case: Case = [(0, request((2, 3, 4), max_tokens=6, min_tokens=6, seed=seed), None) for seed in range(3)]
    runner = Recorded(4, overlaps=True)
    told, _, _ = run(case, runner)
    assert all(events[-1].finish_reason is FinishReason.LENGTH for events in told.values())
    assert runner.num_launched == 6, "a step was run for nobody"
    assert runner.num_ahead == 5, "a step was not launched ahead"


def test_grammar_keeps_every_step_from_being_launched_ahead_of_its_token():
    runner = Recorded(2, overlaps=True)
    told, _, _ = run([(0, request((2, 3), max_tokens=9, grammar=Upwards), None)], runner)
    assert [event.token_id for event in told["0"]] == [3, 4, 5, 6, 7]
    assert runner.num_ahead == 0


def test_prefix_of_a_finished_request_holds_no_token_of_the_step_that_ran_ahead():
    prompt = tuple(2 + place % 5 for place in range(30))
    cached = []
    for overlaps in (False, True):
        first = request(prompt, max_tokens=20, stop=("c", "d", "e", "f", "g", "h"))
        told, _, _ = run([(0, first, None)], Recorded(1, overlaps=overlaps))
        output = tuple(event.token_id for event in told["0"] if event.token_id is not None)
        again = request((*prompt, *output, 3, 3), max_tokens=2)
        told, _, _ = run([(0, first, None), (40, again, None)], Recorded(1, overlaps=overlaps))
        usage = told["1"][-1].usage
        cached.append(usage and usage.cached_tokens)
    assert cached[0] == cached[1]
    assert cached[0] is not None
    assert cached[0] >= len(prompt)
