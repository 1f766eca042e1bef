"""Sampling fields through the whole engine: a tiny model's tokens against what transformers' own logits say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tiny import Loaded, collect, generate_alone, load, native, next_logits, request, tiny_llama

from serve.engine.base import TokenStream
from serve.errors import GenerationFailed, InvalidRequest
from serve.types import FinishReason, SamplingParams, TokenEvent

PROMPT = [7, 8, 9, 10, 11] * 9
"""Longer than a chunk, so that a prompt's log-probabilities come from several steps."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    return load(tiny_llama(tmp_path_factory.mktemp("llama")), chunk=16, slots=4)


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **changes})


async def events_of(stream: TokenStream) -> list[TokenEvent]:
    return [event async for events in stream for event in events]


async def test_greedy_under_penalties_equals_a_slow_loop_over_transformers(loaded):
    params = greedy(frequency_penalty=0.3, presence_penalty=0.2, repetition_penalty=1.2, logit_bias=((40, 0.5),))
    tokens = list(PROMPT)
    for _ in range(12):
        logits = next_logits(loaded, tokens).clone()
        output = tokens[len(PROMPT) :]
        for token in set(tokens):
            logits[token] = logits[token] / 1.2 if logits[token] > 0 else logits[token] * 1.2
        for token in set(output):
            logits[token] -= 0.3 * output.count(token) + 0.2
        logits[40] += 0.5
        tokens.append(int(logits.argmax()))
    async with loaded.running() as engine:
        answers = await asyncio.gather(
            *(collect(engine.submit(request(PROMPT, each))) for each in (greedy(), params, greedy()))
        )
    assert answers[1].token_ids == tokens[len(PROMPT) :]
    assert answers[0].token_ids == answers[2].token_ids == generate_alone(loaded, PROMPT, 12)


async def test_logprobs_of_prompt_and_completion_equal_transformers(loaded):
    async with loaded.running() as engine:
        asked = engine.submit(request(PROMPT, greedy(logprobs=3, prompt_logprobs=1, max_tokens=5)))
        others = [engine.submit(request(PROMPT, greedy())) for _ in range(2)]
        events = await events_of(asked)
        answers = [await collect(other) for other in others]
    tokens = PROMPT + [event.token_id for event in events if event.token_id is not None]
    with torch.inference_mode():
        exact = native(loaded)(torch.tensor([tokens])).logits[0].log_softmax(-1)
    prompt = events[0].prompt_logprobs
    assert prompt is not None
    assert len(prompt) == len(PROMPT)
    assert prompt[0] is None
    found = [*prompt[1:], *(logprob for event in events for logprob in event.logprobs)]
    for at, logprob in enumerate(found):
        assert logprob is not None
        assert logprob.token_id == tokens[at + 1]
        assert logprob.logprob == pytest.approx(float(exact[at, tokens[at + 1]]), abs=1e-4)
        assert logprob.top[0][1] == pytest.approx(float(exact[at].max()), abs=1e-4)
    assert len(found) == len(tokens) - 1
    assert [answer.token_ids for answer in answers] == [generate_alone(loaded, PROMPT, 12)] * 2


async def test_end_of_sequence_waits_for_min_tokens_or_is_ignored(loaded):
    first = generate_alone(loaded, PROMPT, 12)
    end = first[0]
    stop = frozenset({end})
    async with loaded.running() as engine:
        plain, late, bounded = await asyncio.gather(
            *(
                collect(engine.submit(request(PROMPT, greedy(stop_token_ids=stop, **more))))
                for more in ({}, {"min_tokens": 6}, {"min_tokens": 12})
            )
        )
    assert plain.token_ids == [end]
    assert plain.finish_reason is FinishReason.STOP
    assert not plain.text, "a stop token is no part of the text"
    assert len(late.token_ids) >= 6
    assert end not in late.token_ids[:6]
    assert bounded.finish_reason is FinishReason.LENGTH


async def test_ignored_end_of_sequence_is_a_token_like_any_other(loaded):
    eos = next(iter(loaded.files.eos_token_ids))
    towards_the_end = {"logit_bias": ((eos, 100.0),), "max_tokens": 4}
    async with loaded.running() as engine:
        obeyed = await collect(engine.submit(request(PROMPT, greedy(**towards_the_end))))
        ignored = await collect(engine.submit(request(PROMPT, greedy(**towards_the_end, ignore_eos=True))))
    assert (obeyed.token_ids, obeyed.finish_reason) == ([eos], FinishReason.STOP)
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 4, FinishReason.LENGTH)


class Spelling:
    """Allows one token after the other; remembers what it was told."""

    def __init__(self, word: list[int], fails_at: int = -1) -> None:
        self._word, self._fails_at = word, fails_at
        self.taken: list[int] = []

    @property
    def is_finished(self) -> bool:
        return len(self.taken) == len(self._word)

    def allowed(self) -> bytes:
        if len(self.taken) == self._fails_at:
            raise RuntimeError("no")
        return (1 << self._word[len(self.taken)]).to_bytes(40, "little")

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_grammar_rules_its_own_request_and_its_neighbours_go_on(loaded, temperature):
    word = [50, 260, 3, 99]
    grammars = [Spelling(word), Spelling(word, fails_at=2)]

    def refuse() -> Spelling:
        raise RuntimeError("no")

    async with loaded.running() as engine:
        makers = [lambda: grammars[0], lambda: grammars[1], refuse]
        streams = [engine.submit(request(PROMPT, greedy(temperature=temperature, grammar=maker))) for maker in makers]
        neighbour = engine.submit(request(PROMPT, greedy()))
        spelled, failed, refused = await asyncio.gather(*map(collect, streams), return_exceptions=True)
        assert (await collect(neighbour)).token_ids == generate_alone(loaded, PROMPT, 12)
    assert not isinstance(spelled, BaseException)
    assert spelled.token_ids == word
    assert spelled.finish_reason is FinishReason.STOP
    assert isinstance(failed, GenerationFailed)
    assert isinstance(refused, GenerationFailed)


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"logit_bias": ((300, 1.0),)}, "logit_bias"), ({"stop_token_ids": frozenset({-1, 5})}, "stop_token_ids")],
)
async def test_token_ids_outside_the_vocabulary_are_refused_before_any_step(loaded, changes, param):
    async with loaded.running() as engine:
        with pytest.raises(InvalidRequest, match="0 to 299") as caught:
            await collect(engine.submit(request(PROMPT, greedy(**changes))))
        assert engine.stats().num_steps == 0
        assert engine.vocab_size == 300
    assert caught.value.param == param
