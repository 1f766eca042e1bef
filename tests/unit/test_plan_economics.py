"""The closed form agrees with a simulation, and with five loads computed by hand."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimaran.plan.economics import Cost, Load, Rhythm, Terms, break_even, cost

NUM_ARRIVALS = 40_000


def simulated(rhythm: Rhythm, draw: random.Random) -> tuple[float, float, float]:
    """Share of time up, share of requests that wait for a boot, and their mean wait, request by request."""
    now = up_s = 0.0
    booted_at = asleep_at = -math.inf
    waited: list[float] = []
    started_at = 0.0
    for _ in range(NUM_ARRIVALS):
        now += draw.expovariate(rhythm.rate)
        if now >= asleep_at:
            up_s += max(0.0, asleep_at - started_at)
            started_at, booted_at = now, now + rhythm.cold_s
            asleep_at = booted_at + rhythm.service_s + rhythm.idle_s
        starts = max(now, booted_at)
        if now < booted_at:
            waited.append(booted_at - now)
        asleep_at = max(asleep_at, starts + rhythm.service_s + rhythm.idle_s)
    up_s += asleep_at - started_at
    return up_s / now, len(waited) / NUM_ARRIVALS, sum(waited) / len(waited) if waited else rhythm.cold_s


@pytest.mark.parametrize("per_hour", [1, 10, 60, 400])
@pytest.mark.parametrize("idle_s", [5, 60, 300])
def test_closed_form_agrees_with_a_simulation(per_hour, idle_s):
    rhythm = Rhythm(rate=per_hour / 3600, service_s=8, idle_s=idle_s, cold_s=40)
    up, waiting, wait_s = simulated(rhythm, random.Random(per_hour * 1000 + idle_s))
    assert rhythm.up_share == pytest.approx(up, rel=0.03)
    assert rhythm.boot_share == pytest.approx(waiting, rel=0.05, abs=0.005)
    if waiting > 0.01:
        assert rhythm.mean_wait_s == pytest.approx(wait_s, rel=0.05)


BY_HAND = [
    # requests/h, dollars/h up, idle s: share of time up, share that waits, $/h, $/1M output tokens
    # (300 tokens out, 8 s a request, 40 s a boot), each worked out apart from this code
    (1, 0.7992, 60, 0.0292954, 0.9814902, 0.02341, 78.04),
    (10, 0.7992, 60, 0.2418601, 0.8423776, 0.19329, 64.43),
    (60, 0.684, 5, 0.4760548, 0.8732419, 0.32562, 18.09),
    (60, 4.176, 300, 0.9941262, 0.0097896, 4.15147, 230.64),
    (600, 1.9512, 60, 0.999988, 0.0000917, 1.95118, 10.84),
]


@pytest.mark.parametrize("row", BY_HAND, ids=lambda row: f"{row[0]}/h at ${row[1]}, idle {row[2]} s")
def test_cost_of_five_loads_computed_by_hand(row):
    per_hour, dollars, idle_s, up, waiting, per_hour_paid, per_million = row
    done = cost(
        Load(per_hour=per_hour, prompt_tokens=500, output_tokens=300),
        Terms(usd_per_hour_up=dollars, service_s=8, cold_s=40, idle_s=idle_s, slots=64),
    )
    assert done.up_share == pytest.approx(up, rel=1e-3)
    assert done.boot_wait_share == pytest.approx(waiting, rel=5e-3)
    assert done.usd_per_hour == pytest.approx(per_hour_paid, rel=1e-3)
    assert done.usd_per_month == pytest.approx(per_hour_paid * 730, rel=1e-3)
    assert done.usd_per_million_output_tokens == pytest.approx(per_million, rel=1e-3)
    assert done.usd_per_million_tokens == pytest.approx(per_million * 300 / 800, rel=1e-3)


def made(per_hour: float, terms: Terms) -> Cost:
    return cost(Load(per_hour=per_hour, prompt_tokens=100, output_tokens=100), terms)


terms_of = st.builds(
    Terms,
    usd_per_hour_up=st.floats(0.1, 10),
    service_s=st.floats(0.1, 100),
    cold_s=st.floats(0, 300),
    idle_s=st.floats(1, 3600),
    slots=st.integers(1, 64),
)


@given(terms_of, st.floats(0.01, 1e5))
def test_cost_stays_between_nothing_and_always_up(terms, per_hour):
    done = made(per_hour, terms)
    assert 0 < done.usd_per_hour <= terms.usd_per_hour_up * done.num_replicas * (1 + 1e-9)
    assert 0 <= done.boot_wait_share <= 1 + 1e-9
    assert done.mean_boot_wait_s <= terms.cold_s
    assert per_hour / 3600 * terms.service_s <= terms.slots * done.num_replicas


@given(terms_of, st.floats(0.05, 0.95))
def test_break_even_is_where_both_cost_the_same(terms, share):
    always_on = terms.usd_per_hour_up * share
    load = break_even(terms, always_on)
    assert load is not None
    rhythm = Rhythm(rate=load / 3600, service_s=terms.service_s, idle_s=terms.idle_s or 0, cold_s=terms.cold_s)
    assert rhythm.up_share * terms.usd_per_hour_up == pytest.approx(always_on, rel=1e-6)
    assert break_even(terms, terms.usd_per_hour_up) is None, "nothing is cheaper than a machine that may also sleep"


def test_machine_that_never_sleeps_makes_nobody_wait():
    done = made(60, Terms(usd_per_hour_up=1, service_s=1, cold_s=40, idle_s=None, slots=8))
    assert (done.up_share, done.boot_wait_share, done.mean_boot_wait_s, done.usd_per_hour) == (1, 0, 0, 1)
