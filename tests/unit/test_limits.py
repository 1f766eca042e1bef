"""Allowances: no more than what flows back, for each caller alone, with a Retry-After that is true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import limits
from serve.api.limits import duration
from serve.errors import RateLimited
from serve.limits import Allowance, Limiter


class Clock:
    def __init__(self, now: float = 1_000_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def refusal(call: Callable[[], object]) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        call()
    return caught.value


def test_limiter_without_limits_admits_everything() -> None:
    limiter = Limiter(Allowance())
    assert limiter.allowance.is_unlimited
    for _ in range(1000):
        limiter.admit("a")
    assert limiter.remaining("a") == []


def test_limiter_makes_no_debt_of_a_clock_that_is_set_back() -> None:
    clock = Clock()
    limiter = Limiter(Allowance(requests_per_minute=2), clock)
    limiter.admit("a")
    clock.now -= 3600
    limiter.admit("a")
    assert refusal(lambda: limiter.admit("a")).retry_after == pytest.approx(30)


def test_limiter_admits_requests_as_they_flow_back() -> None:
    clock = Clock()
    limiter = Limiter(Allowance(requests_per_minute=6), clock)
    for _ in range(6):
        limiter.admit("a")
    error = refusal(lambda: limiter.admit("a"))
    assert error.retry_after == pytest.approx(10)
    assert "6 requests per minute" in error.message
    limiter.admit("b")  # somebody else's allowance is untouched
    clock.now += 9.9
    refusal(lambda: limiter.admit("a"))
    clock.now += 0.2
    limiter.admit("a")


@given(
    st.integers(1, 30),
    st.lists(st.floats(0.0, 20.0), min_size=1, max_size=60),
)
def test_limiter_never_admits_more_than_its_rate(per_minute: int, pauses: list[float]) -> None:
    """In any stretch of time: at most what may come at once, and what flows back meanwhile."""
    clock = Clock()
    limiter = Limiter(Allowance(requests_per_minute=per_minute), clock)
    admitted: list[float] = []
    for pause in pauses:
        clock.now += pause
        try:
            limiter.admit("a")
        except RateLimited as error:
            clock.now += (error.retry_after or 0) + 1e-6
            limiter.admit("a")  # Retry-After is true
        admitted.append(clock.now)
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            elapsed = admitted[last] - admitted[first]
            assert last - first + 1 <= per_minute + elapsed * per_minute / 60 + 1e-6


def test_limiter_takes_tokens_when_a_request_ends() -> None:
    clock = Clock()
    limiter = Limiter(Allowance(tokens_per_minute=600), clock)
    limiter.admit("a")
    limiter.release("a", 700)  # 100 more than there were
    error = refusal(lambda: limiter.admit("a"))
    assert error.retry_after == pytest.approx(10.1)
    assert limiter.remaining("a")[0].remaining == 0
    clock.now += 10.2
    limiter.admit("a")


def test_limiter_counts_a_day_in_utc() -> None:
    clock = Clock(limits.DAY_S * 10_000 + 1000.0)
    limiter = Limiter(Allowance(tokens_per_day=100), clock)
    limiter.admit("a")
    limiter.release("a", 100)
    error = refusal(lambda: limiter.admit("a"))
    assert error.retry_after == limits.DAY_S - 1000
    clock.now += limits.DAY_S - 1000
    limiter.admit("a")


def test_limiter_bounds_the_dollars_of_a_day() -> None:
    clock = Clock(limits.DAY_S * 10_000 + 1000.0)
    limiter = Limiter(Allowance(usd_per_day=0.5), clock)
    for _ in range(2):
        limiter.admit("a")
        limiter.release("a", 7, 0.3)
    error = refusal(lambda: limiter.admit("a"))
    assert "$0.5 of machine time per day" in error.message
    assert error.retry_after == limits.DAY_S - 1000
    (left,) = limiter.remaining("a")
    assert (left.kind, left.limit, left.remaining, left.resets_in_s) == ("usd-day", 0.5, 0, limits.DAY_S - 1000)
    limiter.admit("b")
    clock.now += limits.DAY_S - 1000
    limiter.admit("a")


@pytest.mark.anyio
async def test_limiter_waits_for_what_was_used_before_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    limiter = Limiter(Allowance(tokens_per_day=100, usd_per_day=1.0), clock)
    limiter.expect_recall()
    entering = asyncio.create_task(limiter.enter("a"))
    await asyncio.sleep(0)
    assert not entering.done()
    limiter.recall(int(clock.now // limits.DAY_S), {"a": (100, 0.1), "b": (1, 1.0)})
    with pytest.raises(RateLimited, match="100 tokens per day"):
        await entering
    with pytest.raises(RateLimited, match=r"\$1 of machine time"):
        await limiter.enter("b")
    limiter.recall(int(clock.now // limits.DAY_S) - 1, {"c": (100, 0.1)})  # yesterday's
    await limiter.enter("c")

    monkeypatch.setattr(limits, "RECALL_WAIT_S", 0.01)
    late = Limiter(Allowance(tokens_per_day=100), clock)
    late.expect_recall()
    await late.enter("a")
    late.release("a", 1)
    late.recall(int(clock.now // limits.DAY_S), {"a": (99, 0.0)})
    with pytest.raises(RateLimited):
        await late.enter("a")


def test_limiter_bounds_what_runs_at_once() -> None:
    limiter = Limiter(Allowance(concurrency=2), Clock())
    limiter.admit("a")
    limiter.admit("a")
    assert "2 of your requests are running" in refusal(lambda: limiter.admit("a")).message
    limiter.release("a", 5)
    limiter.admit("a")


def test_limiter_refused_requests_use_nothing() -> None:
    limiter = Limiter(Allowance(concurrency=1, requests_per_minute=5), Clock())
    limiter.admit("a")
    for _ in range(20):
        refusal(lambda: limiter.admit("a"))
    assert limiter.remaining("a")[0].remaining == 4


def test_limiter_forgets_callers_who_owe_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CALLERS", 10)
    clock = Clock()
    limiter = Limiter(Allowance(requests_per_minute=1, tokens_per_day=5), clock)
    limiter.admit("debtor")
    limiter.release("debtor", 5)
    for number in range(100):
        limiter.admit(f"caller-{number}")
        limiter.release(f"caller-{number}", 0)
        clock.now += 61
    assert len(limiter._callers) <= 11
    refusal(lambda: limiter.admit("debtor"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.02, "20ms"), (1, "1s"), (1.5, "1.5s"), (59.9996, "60s"), (60, "1m0s"), (366, "6m6s")],
)
def test_duration_is_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
