"""Distributions, not just runs: chi-square with fixed seeds against what the parameters mean, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.drawing import GOLDEN, WIDTHS, WORD, _mix, pick, race_base, race_of
from serve.engine.sampler import Sampler
from serve.engine.scheduler import Sequence
from serve.types import GenerationRequest, SamplingParams

VOCAB = 12
DRAWS = 2000
CPU = torch.device("cpu")
EOS = 3


class ListGrammar:
    """Allows the same tokens always."""

    is_finished = False

    def __init__(self, *token_ids: int) -> None:
        self._allowed = sum(1 << token_id for token_id in token_ids).to_bytes(4, "little")

    def allowed(self) -> bytes:
        return self._allowed

    def accept(self, token_id: int) -> None:
        pass


def sequence(params: SamplingParams, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1,)) -> Sequence:
    request = GenerationRequest(request_id="r", prompt_token_ids=prompt, params=params)
    made = Sequence(request, output_token_ids=list(output), end_token_ids=frozenset({EOS}) | params.stop_token_ids)
    made.grammar = params.grammar() if params.grammar else None
    return made


def expected(logits: torch.Tensor, row: Sequence) -> torch.Tensor:
    """The distribution by its definition, token by token: changes, then temperature, top_k, top_p, min_p."""
    params = row.params
    values = logits.double().tolist()
    for token in range(len(values)):
        count = row.output_token_ids.count(token)
        if count or token in row.prompt_token_ids:
            factor = params.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        values[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        values[token] += dict(params.logit_bias).get(token, 0.0)
        if params.grammar is None and len(row.output_token_ids) < params.min_tokens and token in row.end_token_ids:
            values[token] = float("-inf")
        if row.grammar is not None and not int.from_bytes(row.grammar.allowed(), "little") >> token & 1:
            values[token] = float("-inf")
    scaled = torch.tensor(values, dtype=torch.float64) / params.temperature
    kept = scaled.argsort(descending=True)[: params.top_k or len(values)]
    probabilities = scaled[kept].softmax(-1)
    before = torch.cat((torch.zeros(1), probabilities.cumsum(-1)[:-1]))
    inside = (before < params.top_p) | (torch.arange(len(kept)) == 0)
    kept, probabilities = kept[inside], probabilities[inside]
    strong = probabilities >= params.min_p * probabilities.max()
    result = torch.zeros(len(values), dtype=torch.float64)
    result[kept[strong]] = probabilities[strong] / probabilities[strong].sum()
    return result


CASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.15},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.1},
    {"frequency_penalty": -0.4, "presence_penalty": 1.5, "temperature": 1.4},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "top_p": 0.85},
    {"logit_bias": ((2, 3.0), (7, -100.0), (5, 1.0))},
    {"logit_bias": ((4, 2.5),), "top_k": 4, "temperature": 0.8},
    {"min_tokens": 9},
    {"min_tokens": 9, "stop_token_ids": frozenset({8}), "repetition_penalty": 1.3},
    {"grammar": lambda: ListGrammar(1, 5, 9)},
    {"grammar": lambda: ListGrammar(0, 2, 4, 6, 11), "top_p": 0.6, "frequency_penalty": 1.0, "min_tokens": 99},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_seeded", [False, True])
def test_sampler_draws_the_distribution_that_the_parameters_mean(case, is_seeded):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    rows = [
        sequence(SamplingParams(max_tokens=99, seed=number if is_seeded else None, **case), (4, 2, 4, 9), (1, 6, 1))
        for number in range(DRAWS)
    ]
    drawn = Sampler(CPU, seed=5).sample(logits.expand(DRAWS, VOCAB), rows).token_ids
    check_distribution([token_id for token_id in drawn if token_id is not None], expected(logits, rows[0]))


def check_distribution(drawn: list[int], probabilities: torch.Tensor) -> None:
    """Chi-square at five standard deviations; cells that expect fewer than five draws count as one."""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probabilities)).double()
    want = probabilities * len(drawn)
    assert counts[want == 0].sum() == 0, "drew a token outside the kept set"
    rare = (want > 0) & (want < 5)
    counts = torch.cat((counts[want >= 5], counts[rare].sum()[None]))
    want = torch.cat((want[want >= 5], want[rare].sum()[None].clamp(min=1.0)))
    chi_square, degrees = float(((counts - want) ** 2 / want).sum()), len(want) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5 + 4, f"chi-square {chi_square} with {degrees} degrees"


def test_different_rows_of_one_batch_each_follow_their_own_parameters():
    logits = torch.randn(len(CASES), VOCAB, generator=torch.Generator().manual_seed(4)) * 2
    repeats = DRAWS // 4
    rows = [sequence(SamplingParams(max_tokens=99, **case), (4, 2, 4, 9), (1, 6, 1)) for case in CASES] * repeats
    drawn = Sampler(CPU, seed=6).sample(logits.repeat(repeats, 1), rows).token_ids
    assert None not in drawn
    for row in range(len(CASES)):
        own = [token_id for token_id in drawn[row :: len(CASES)] if token_id is not None]
        check_distribution(own, expected(logits[row], rows[row]))


def test_seeded_draws_of_successive_steps_are_independent():
    """One request's tokens over its steps: pairs of neighbours are uniform over all pairs."""
    logits = torch.zeros(1, 4)
    params = SamplingParams(max_tokens=9999, seed=12)
    row, sampler = sequence(params), Sampler(CPU, seed=0)
    for _ in range(DRAWS):
        (token_id,) = sampler.sample(logits, [row]).token_ids
        row.output_token_ids.append(token_id or 0)
    pairs = torch.bincount(torch.tensor([a * 4 + b for a, b in itertools.pairwise(row.output_token_ids)]), minlength=16)
    want = (DRAWS - 1) / 16
    assert float(((pairs - want) ** 2 / want).sum()) < 15 + 5 * 30**0.5


@pytest.mark.parametrize("case", CASES)
def test_seeded_row_draws_the_same_in_any_company(case):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(VOCAB, generator=generator)
    seeded = SamplingParams(max_tokens=9, seed=11, **case)
    alone = Sampler(CPU, seed=1).sample(logits[None], [sequence(seeded, (0, 0, 5, 2))]).token_ids[0]
    for number, company in enumerate(itertools.pairwise(CASES)):
        others = [sequence(SamplingParams(max_tokens=9, **other)) for other in company]
        batch = torch.stack((torch.randn(VOCAB, generator=generator), logits, torch.randn(VOCAB, generator=generator)))
        rows = [others[0], sequence(seeded, (0, 0, 5, 2)), others[1]]
        assert Sampler(CPU, seed=number).sample(batch, rows).token_ids[1] == alone


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**64), st.sampled_from([0, 5, 300, 3000]), st.sampled_from([1.0, 0.9, 0.3]), st.booleans())
def test_equal_logits_do_not_make_a_seeded_row_depend_on_its_company(seed, top_k, top_p, is_flat):
    """bfloat16 logits tie all the time, and how ties are sorted depends on the batch."""
    generator = torch.Generator().manual_seed(seed % 2**62)
    logits = torch.randn(3, 5000, generator=generator).bfloat16() * (0 if is_flat else 2)
    row = sequence(SamplingParams(max_tokens=9, seed=seed, top_k=top_k, top_p=top_p))
    alone = Sampler(CPU, seed=1).sample(logits[1:2], [row]).token_ids[0]
    company = [
        sequence(SamplingParams(max_tokens=9, top_k=4000)),
        sequence(SamplingParams(max_tokens=9, top_p=0.999)),
    ]
    assert Sampler(CPU, seed=2).sample(logits, [company[0], row, company[1]]).token_ids[1] == alone


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.5, 1.0, 3.0]), min_size=1, max_size=300), st.data())
def test_pick_takes_the_token_whose_share_holds_the_point(weights, data):
    if not any(weight > 1e-20 for weight in weights):
        weights[0] = 1.0
    point = data.draw(st.floats(0, 1 - 2**-50))
    chosen = int(pick(torch.tensor([weights]), torch.tensor([[point]], dtype=torch.float64)))
    total = sum(weights)
    assert weights[chosen] > 0
    slack = 1e-5
    assert sum(weights[:chosen]) / total <= point + slack
    assert sum(weights[: chosen + 1]) / total >= point - slack


@given(st.integers(-(2**70), 2**70), st.integers(0, 10**6), st.integers(0, 999))
def test_race_gives_each_token_a_clock_that_its_seed_and_step_alone_decide(seed, step, token_id):
    """A token of weight 1 against one of a weight that makes it win or lose by little, by the clocks' own formula."""

    def clock(token_id: int) -> float:
        bits = _mix((race_base(seed, step) + (token_id + 1) * GOLDEN) % WORD)
        return -math.log(((bits >> 11) + 0.5) / 2**53)

    weights, bases = torch.zeros(1, 1000), torch.tensor([[race_base(seed, step)]])
    other = (token_id + 7) % 1000
    weights[0, token_id], level = 1.0, clock(other) / clock(token_id)
    for factor, winner in ((0.999, token_id), (1.001, other)):
        weights[0, other] = level * factor
        assert int(race_of(weights, bases)) == winner
    assert race_base(seed, step) != race_base(seed, step + 1)


def test_seeded_draws_survive_the_rounding_of_other_batches():
    """From nearly flat logits over a whole vocabulary, where a point among running sums finds another token."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 20_000, generator=generator)
    rounded = logits + 2e-6 * torch.randn(logits.shape, generator=generator)
    rows = [sequence(SamplingParams(max_tokens=9, seed=number, temperature=1.5)) for number in range(200)]
    first, second = (Sampler(CPU, seed=0).sample(values, rows).token_ids for values in (logits, rounded))
    assert first == second
    assert len(set(first)) > 190


@settings(deadline=None, max_examples=60)
@given(
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.5, 2),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    st.lists(st.integers(0, VOCAB - 1), max_size=12),
    st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
)
def test_greedy_under_penalties_takes_the_best_of_a_slow_reference(frequency, presence, repetition, prompt, out, bias):
    """Token by token as a request grows, so that counts kept between steps are checked too."""
    changes: Any = {
        "frequency_penalty": frequency,
        "presence_penalty": presence,
        "repetition_penalty": repetition,
        "logit_bias": tuple(bias.items()),
    }
    row = sequence(SamplingParams(max_tokens=99, temperature=0.0, **changes), (), tuple(prompt))
    plain = sequence(SamplingParams(max_tokens=9, temperature=0.0))
    reference = SamplingParams(max_tokens=99, **changes)
    sampler = Sampler(CPU, seed=0)
    for step, token in enumerate(out):
        logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(step)) * 3
        drawn = sampler.sample(logits, [plain, row]).token_ids
        want = expected(logits[1], sequence(reference, tuple(row.output_token_ids), tuple(prompt)))
        assert want[drawn[1] or 0] >= want.max() * (1 - 1e-4)
        assert drawn[0] == int(logits[0].argmax())
        row.output_token_ids.append(token)


def test_greedy_row_ignores_its_sampling_neighbours():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0]])
    rows = [sequence(SamplingParams(max_tokens=1, temperature=0.0)), sequence(SamplingParams(max_tokens=1))]
    sampler = Sampler(CPU, seed=0)
    assert {sampler.sample(logits, rows).token_ids[0] for _ in range(20)} == {1}


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"presence_penalty": 0.1}])
@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-6, 1e-4])
def test_tiny_temperature_takes_the_most_likely_token(temperature, params):
    logits = torch.tensor([[1.0, 2.0, 10.0, 3.0, -1.0]])
    row = sequence(SamplingParams(max_tokens=1, temperature=temperature, **params))
    sampler = Sampler(CPU, seed=0)
    assert {sampler.sample(logits, [row]).token_ids[0] for _ in range(20)} == {2}


@pytest.mark.parametrize("vocab", [WIDTHS[0] * 8, WIDTHS[-1] * 8])
def test_nucleus_beyond_a_trim_width_is_drawn_from_more(vocab):
    rows = [sequence(SamplingParams(max_tokens=1, top_p=0.99)) for _ in range(64)]
    drawn = Sampler(CPU, seed=0).sample(torch.zeros(64, vocab), rows).token_ids
    assert max(token_id or 0 for token_id in drawn) > vocab // 2


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "case", [{}, {"presence_penalty": 1.0}, {"grammar": lambda: ListGrammar(0, 1)}, {"top_p": 0.5}]
)
def test_row_that_is_not_finite_is_reported_and_its_neighbours_are_drawn(poison, case):
    """Also where the poisoned token itself is forbidden."""
    logits = torch.randn(3, VOCAB)
    logits[1, 4] = poison
    rows = [
        sequence(SamplingParams(max_tokens=1, temperature=0.0)),
        sequence(SamplingParams(max_tokens=1, logprobs=2, **case)),
        sequence(SamplingParams(max_tokens=1)),
    ]
    output = Sampler(CPU, seed=0).sample(logits, rows)
    assert output.token_ids[1] is None
    assert not output.errors
    assert not output.logprobs
    assert output.token_ids[0] == int(logits[0].argmax())
    assert output.token_ids[2] is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_no_poison(temperature):
    params = SamplingParams(
        max_tokens=1, temperature=temperature, logit_bias=((0, float("-inf")),), grammar=lambda: ListGrammar(0, 7)
    )
    assert Sampler(CPU, seed=0).sample(torch.randn(1, VOCAB), [sequence(params)]).token_ids == [7]
