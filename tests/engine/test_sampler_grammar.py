"""What a grammar, stop tokens and log-probabilities do to a row, and that nobody else notices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.logprobs import token_logprobs
from serve.engine.sampler import Sampler
from serve.engine.scheduler import Sequence
from serve.errors import GenerationFailed
from serve.types import MIN_LOGPROB, GenerationRequest, SamplingParams

VOCAB = 70
CPU = torch.device("cpu")


class Mask:
    """A grammar that is only a mask, or an exception."""

    def __init__(self, mask: bytes | Exception, *, is_finished: bool = False) -> None:
        self.is_finished = is_finished
        self._mask = mask

    def allowed(self) -> bytes:
        if isinstance(self._mask, Exception):
            raise self._mask
        return self._mask

    def accept(self, token_id: int) -> None:
        pass


def row(grammar: Any = None, end_token_ids: frozenset[int] = frozenset({3}), **params: Any) -> Sequence:
    made = SamplingParams(
        **{"max_tokens": 9, "temperature": 0.0, **params}, grammar=(lambda: grammar) if grammar else None
    )
    request = GenerationRequest(request_id="r", prompt_token_ids=(1,), params=made)
    return Sequence(request, grammar=grammar, end_token_ids=end_token_ids)


@given(st.sets(st.integers(0, VOCAB + 30), min_size=1), st.integers(0, 16), st.integers(0, 10**6))
def test_mask_of_any_length_allows_exactly_its_tokens(allowed, num_bytes, seed):
    mask = (sum(1 << token_id for token_id in allowed)).to_bytes(20, "little")[:num_bytes]
    inside = {token_id for token_id in allowed if token_id < min(VOCAB, num_bytes * 8)}
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(seed))
    output = Sampler(CPU, seed=0).sample(logits, [row(), row(Mask(mask))])
    assert output.token_ids[0] == int(logits[0].argmax())
    best = max(inside, key=lambda token_id: float(logits[1, token_id]), default=None)
    assert output.token_ids[1] == best


def test_grammar_that_raises_fails_its_own_row_alone():
    logits = torch.randn(3, VOCAB)
    output = Sampler(CPU, seed=0).sample(
        logits, [row(), row(Mask(RuntimeError("secret"))), row(Mask(b"\x20" + b"\0" * 8))]
    )
    assert output.token_ids == [int(logits[0].argmax()), None, 5]
    assert isinstance(output.errors[1], GenerationFailed)
    assert "secret" not in output.errors[1].message


def test_after_the_end_of_a_grammar_only_an_end_token_follows():
    logits = torch.randn(1, VOCAB)
    output = Sampler(CPU, seed=0).sample(logits, [row(Mask(b"", is_finished=True), frozenset({17}))])
    assert output.token_ids == [17]


def test_grammar_wins_over_min_tokens():
    only_the_end = (1 << 3).to_bytes(12, "little")
    output = Sampler(CPU, seed=0).sample(torch.randn(1, VOCAB), [row(Mask(only_the_end), min_tokens=5)])
    assert output.token_ids == [3]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 80), min_size=1, max_size=5), st.booleans())
def test_logprobs_are_those_of_the_models_own_distribution(seed, num_top, is_bfloat16):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(num_top), VOCAB, generator=generator) * 4
    logits = logits.bfloat16() if is_bfloat16 else logits
    rows = [row(logprobs=count, temperature=1.5, logit_bias=((2, 50.0),), top_k=3) for count in num_top]
    output = Sampler(CPU, seed=0).sample(logits, rows)
    exact = logits.double().log_softmax(-1)
    for at, count in enumerate(num_top):
        found = output.logprobs[at]
        assert found.token_id == output.token_ids[at]
        assert found.logprob == pytest.approx(float(exact[at, found.token_id]), abs=1e-4)
        assert len(found.top) == min(count, VOCAB) == len({token_id for token_id, _ in found.top})
        best = exact[at].sort(descending=True).values[: len(found.top)]
        assert [value for _, value in found.top] == pytest.approx(best.tolist(), abs=1e-4)
        assert all(value == pytest.approx(float(exact[at, token_id]), abs=1e-4) for token_id, value in found.top)


def test_rows_that_do_not_ask_get_no_logprobs():
    output = Sampler(CPU, seed=0).sample(torch.randn(3, VOCAB), [row(), row(logprobs=0), row()])
    assert set(output.logprobs) == {1}
    assert output.logprobs[1].top == ()


def test_among_equal_tokens_the_chosen_one_is_named_first():
    found = token_logprobs(torch.zeros(3, VOCAB), torch.tensor([69, 0, 31]), [1, 5, VOCAB])()
    assert [entry.top[0][0] for entry in found] == [69, 0, 31]


def test_logprobs_are_numbers_that_json_knows():
    logits = torch.tensor([[0.0, -math.inf, -math.inf], [math.nan, 0.0, 1.0]])
    impossible, unknown = token_logprobs(logits, torch.tensor([2, 1]), [3, 3])()
    assert impossible.logprob == MIN_LOGPROB
    assert impossible.top[0] == (0, 0.0)
    assert all(math.isfinite(value) for entry in (impossible, unknown) for _, value in entry.top)
    assert math.isfinite(unknown.logprob)


def test_many_prompt_positions_are_computed_in_slices():
    logits = torch.randn(200, VOCAB)
    tokens = [number % VOCAB for number in range(200)]
    exact = logits.double().log_softmax(-1)
    found = token_logprobs(logits, torch.tensor(tokens), [1] * 200)()
    assert [entry.logprob for entry in found] == pytest.approx(
        [float(exact[n, t]) for n, t in enumerate(tokens)], abs=1e-4
    )
