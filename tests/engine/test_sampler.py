"""Distributions, not just runs: chi-square with fixed seeds against what the parameters mean."""

from __future__ import annotations

import itertools

import pytest
import torch

from serve.engine.sampler import TRIM_WIDTH, Sampler
from serve.engine.scheduler import Sequence
from serve.types import GenerationRequest, SamplingParams

VOCAB = 12
DRAWS = 4000


def sequence(params: SamplingParams, step: int = 0) -> Sequence:
    request = GenerationRequest(request_id="r", prompt_token_ids=(1,), params=params)
    return Sequence(request, output_token_ids=[0] * step)


def expected(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution by its definition, on the whole vocabulary: temperature, top_k, top_p, min_p in this order."""
    order = (logits / params.temperature).argsort(descending=True)
    kept = order[: params.top_k or len(order)]
    scaled = (logits / params.temperature)[kept].softmax(-1)
    before = torch.cat((torch.zeros(1), scaled.cumsum(-1)[:-1]))
    inside = (before < params.top_p) | (torch.arange(len(kept)) == 0)
    kept, scaled = kept[inside], scaled[inside]
    strong = scaled >= params.min_p * scaled.max()
    probabilities = torch.zeros_like(logits)
    probabilities[kept[strong]] = scaled[strong] / scaled[strong].sum()
    return probabilities


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.15},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_seeded", [False, True])
def test_sampler_draws_the_distribution_that_the_parameters_mean(case, is_seeded):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    sampler = Sampler(torch.device("cpu"), seed=5)
    rows = [
        sequence(SamplingParams(max_tokens=1, seed=number if is_seeded else None, **case)) for number in range(DRAWS)
    ]
    drawn = torch.tensor(sampler.sample(logits.expand(DRAWS, VOCAB), rows))
    counts = torch.bincount(drawn, minlength=VOCAB).float()
    want = expected(logits, rows[0].request.params) * DRAWS
    assert counts[want == 0].sum() == 0, "drew a token outside the kept set"
    possible = want > 0
    chi_square = float(((counts - want)[possible] ** 2 / want[possible]).sum())
    degrees = int(possible.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5 + 3, f"chi-square {chi_square} with {degrees} degrees"


@pytest.mark.parametrize("case", CASES)
def test_seeded_row_draws_the_same_in_any_company(case):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(VOCAB, generator=generator)
    seeded = sequence(SamplingParams(max_tokens=9, seed=11, **case), step=4)
    alone = Sampler(torch.device("cpu"), seed=1).sample(logits[None], [seeded])[0]
    for number, company in enumerate(itertools.permutations(CASES, 2)):
        others = [sequence(SamplingParams(max_tokens=9, **other)) for other in company]
        batch = torch.stack((torch.randn(VOCAB, generator=generator), logits, torch.randn(VOCAB, generator=generator)))
        sampler = Sampler(torch.device("cpu"), seed=number)
        assert sampler.sample(batch, [others[0], seeded, others[1]])[1] == alone


def test_seeded_draws_differ_from_step_to_step():
    logits = torch.zeros(1, 1000)
    sampler = Sampler(torch.device("cpu"), seed=0)
    params = SamplingParams(max_tokens=99, seed=3)
    assert len({sampler.sample(logits, [sequence(params, step)])[0] for step in range(20)}) > 15


def test_greedy_row_ignores_its_sampling_neighbours():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0]])
    rows = [sequence(SamplingParams(max_tokens=1, temperature=0.0)), sequence(SamplingParams(max_tokens=1))]
    sampler = Sampler(torch.device("cpu"), seed=0)
    assert {sampler.sample(logits, rows)[0] for _ in range(20)} == {1}


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-6, 1e-4])
def test_tiny_temperature_takes_the_most_likely_token(temperature, params):
    logits = torch.tensor([[1.0, 2.0, 10.0, 3.0, -1.0]])
    row = sequence(SamplingParams(max_tokens=1, temperature=temperature, **params))
    sampler = Sampler(torch.device("cpu"), seed=0)
    assert {sampler.sample(logits, [row])[0] for _ in range(20)} == {2}


def test_nucleus_beyond_the_trim_width_is_drawn_from_the_whole_vocabulary():
    vocab = TRIM_WIDTH * 8
    rows = [sequence(SamplingParams(max_tokens=1, top_p=0.99)) for _ in range(64)]
    drawn = Sampler(torch.device("cpu"), seed=0).sample(torch.zeros(64, vocab), rows)
    assert max(token_id or 0 for token_id in drawn) > TRIM_WIDTH * 4


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_row_that_is_not_finite_is_reported_and_its_neighbours_are_drawn(poison):
    logits = torch.randn(3, VOCAB)
    logits[1, 4] = poison
    rows = [sequence(SamplingParams(max_tokens=1, temperature=t)) for t in (0.0, 1.0, 1.0)]
    drawn = Sampler(torch.device("cpu"), seed=0).sample(logits, rows)
    assert drawn[1] is None
    assert drawn[0] == int(logits[0].argmax())
    assert drawn[2] is not None
