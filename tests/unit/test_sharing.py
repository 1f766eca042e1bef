"""Limits of all replicas together, with a database in memory that can be away or slow."""

from __future__ import annotations

import asyncio
import logging

import pytest
from replicas import Clock, Database, Store, let_in, replicas, told, until, up

from serve.errors import RateLimited
from serve.limits import DAY_S, Allowance
from serve.sharing import limiter as limiter_module
from serve.sharing import link as link_module
from serve.sharing.limiter import SharedLimiter
from serve.sharing.store import Ask

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"STEADY_WAIT_S": 0.5, "FIRST_PAUSE_S": 0.01, "MAX_PAUSE_S": 0.02}.items():
        monkeypatch.setattr(link_module, name, seconds)
    monkeypatch.setattr(limiter_module, "REFUSED_S", 0.0)


async def test_replicas_together_let_in_what_one_would() -> None:
    async with replicas(2, requests_per_minute=6) as (_, (one, two), clock):
        assert await let_in(one, 4) + await let_in(two, 4) == 6
        with pytest.raises(RateLimited, match="6 requests per minute") as caught:
            await one.enter("a")
        assert caught.value.retry_after == pytest.approx(10)
        assert [left.remaining for left in two.remaining("a")] == [0]
        assert await let_in(two, 1, "b") == 1
        clock.now += 10.01
        assert await let_in(two, 2) + await let_in(one, 2) == 1
        assert one.num_alone == two.num_alone == 0


async def test_replicas_know_tokens_and_dollars_of_each_other() -> None:
    async with replicas(2, tokens_per_minute=60, tokens_per_day=200, usd_per_day=1.0) as (_, (one, two), clock):
        await one.enter("a")
        one.release("a", 90, 0.2)
        await told(one)
        with pytest.raises(RateLimited, match="60 tokens per minute") as caught:
            await two.enter("a")
        assert caught.value.retry_after == pytest.approx(31)
        clock.now += 60
        await two.enter("a")
        two.release("a", 1, 0.8)
        await told(two)
        with pytest.raises(RateLimited, match=r"\$1 of machine time"):
            await one.enter("a")
        kinds = {left.kind: left.remaining for left in one.remaining("a")}
        assert (kinds["tokens-day"], kinds["usd-day"]) == (109, 0)


async def test_replicas_bound_what_runs_at_once() -> None:
    async with replicas(2, concurrency=3) as (_, (one, two), _clock):
        assert await let_in(one, 2) + await let_in(two, 2) == 3
        with pytest.raises(RateLimited, match="3 of your requests are running"):
            await one.enter("a")
        two.release("a", 0)
        await told(two)
        assert await let_in(one, 2) == 1


async def test_replica_asks_once_for_all_who_wait() -> None:
    async with replicas(1, requests_per_minute=1000) as (database, (one,), _):
        before = database.num_exchanges
        assert await let_in(one, 200) == 200
        assert database.num_exchanges - before <= 3


async def test_replica_does_not_ask_again_for_who_was_just_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter_module, "REFUSED_S", 0.2)
    async with replicas(1, requests_per_minute=6) as (database, (one,), clock):
        await let_in(one, 7)
        before = database.num_exchanges
        for _ in range(20):
            with pytest.raises(RateLimited, match="6 requests per minute"):
                await one.enter("a")
        assert database.num_exchanges == before
        clock.now += 10.01
        await one.enter("a")


async def test_replicas_give_their_parts_while_the_database_is_away(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve.sharing")
    async with replicas(2, requests_per_minute=10, tokens_per_day=100, concurrency=20) as (database, both, clock):
        one, two = both
        assert await let_in(one, 4) == 4
        await told(one)
        assert await let_in(two, 1) == 1
        assert await let_in(one, 1) == 1  # so that it knows of the other's
        database.is_away = True
        caplog.clear()
        for limiter in both:
            assert await let_in(limiter, 9) == 2  # 4 were left
            await up(limiter, False)
        assert [left.limit for left in one.remaining("a")][:1] == [5]
        one.release("a", 30)
        clock.now += 12
        assert await let_in(one, 9) == await let_in(two, 9) == 1  # half of the two that came back
        assert one.num_alone == two.num_alone == 18
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
        assert "1/2 of each limit" in caplog.text
        database.is_away = False
        for limiter in both:
            await up(limiter)
            await told(limiter)
        assert caplog.text.count("Limits are shared") == 2
        with pytest.raises(RateLimited, match="10 requests per minute"):
            await one.enter("a")
        assert database.limiter.standing("a").tokens_today == 30
        assert sum(database.leases["a"].values()) == 11
        clock.now += 6.01
        assert await let_in(two, 3) == 1


async def test_request_waits_for_a_slow_database_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter_module, "WAIT_S", 0.03)
    async with replicas(1, requests_per_minute=10) as (database, (one,), _):
        database.answers.clear()
        await one.enter("a")
        assert (one.link.is_up, one.num_alone) == (False, 1)
        monkeypatch.setattr(limiter_module, "WAIT_S", 60)
        await one.enter("a")  # nobody waits for it now
        database.answers.set()
        await up(one)
        await told(one)
        level = database.limiter.standing("a").requests
        assert level is not None
        assert level.level(database.clock()) == pytest.approx(8)  # what was granted too late is given back


async def test_request_that_is_given_up_leaves_its_place() -> None:
    async with replicas(1, concurrency=1) as (database, (one,), _):
        before = database.num_exchanges
        database.answers.clear()
        entering = asyncio.create_task(one.enter("a"))
        await until(lambda: database.num_exchanges > before)
        entering.cancel()
        await asyncio.wait({entering})
        assert database.leases["a"] == {"0": 1}  # it was granted
        database.answers.set()
        await until(lambda: database.leases["a"] == {"0": 0})
        assert one.standing("a").num_running == 0
        assert await let_in(one, 2) == 1


async def test_replica_that_cannot_reach_the_database_decides_alone(caplog: pytest.LogCaptureFixture) -> None:
    clock, allowance = Clock(), Allowance(requests_per_minute=3)
    database = Database(allowance, clock)
    database.is_away = True
    limiter = SharedLimiter(allowance, lambda: Store(database, "one"), clock)
    limiter.expect_recall()
    limiter.link.start()
    entering = asyncio.create_task(limiter.enter("a"))
    await asyncio.sleep(0.01)
    assert not entering.done()  # it waits for the first attempt
    limiter.recall(int(clock.now // DAY_S), {"a": (50, 0.5)})
    await entering
    assert await let_in(limiter, 9) == 2
    assert "each limit in full" in caplog.text
    database.is_away = False
    await up(limiter)
    await limiter.link.close()


async def test_replica_tells_again_what_went_with_a_broken_connection() -> None:
    async with replicas(1, tokens_per_day=1000, concurrency=9) as (database, (one,), _):
        await one.enter("a")
        database.is_broken = True
        one.release("a", 70)
        await up(one, False)
        await one.enter("a")
        one.release("a", 5)
        assert [left.remaining for left in one.remaining("a")] == [925]
        database.is_broken = False
        await up(one)
        await told(one)
        assert database.limiter.standing("a").tokens_today == 75
        assert database.leases["a"] == {"0": 0}


async def test_replica_alone_counts_what_it_ran_before() -> None:
    async with replicas(2, concurrency=6) as (database, (one, _two), _):
        assert await let_in(one, 2) == 2
        database.is_away = True
        assert await let_in(one, 5) == 1  # its part is 3
        for _ in range(3):
            one.release("a", 0)
        assert await let_in(one, 5) == 3


async def test_replica_stays_alone_while_answers_take_too_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with replicas(1, requests_per_minute=5) as (database, (one,), _):
        database.is_broken = True
        await let_in(one, 1)
        monkeypatch.setattr(link_module, "STEADY_WAIT_S", -1.0)
        before, database.is_broken = database.num_exchanges, False
        await until(lambda: database.num_exchanges > before)
        await told(one)
        await asyncio.sleep(0.05)
        assert not one.link.is_up
        assert caplog.text.count("Limits are not shared") == 1
        monkeypatch.setattr(link_module, "STEADY_WAIT_S", 1.0)
        await up(one)


async def test_first_row_of_a_caller_has_what_records_know_of_the_day() -> None:
    asked: list[Ask] = []
    async with replicas(1, tokens_per_day=100) as (database, (one,), clock):
        answer = database.answer
        database.answer = lambda replica, ask: asked.append(ask) or answer(replica, ask)  # type: ignore[method-assign]
        one.recall(int(clock.now // DAY_S), {"a": (40, 0.0)})
        await one.enter("a")
        one.release("a", 7)
        await told(one)
    assert (asked[0].known_tokens, asked[0].tokens_today) == (40, 0)
    assert asked[-1].tokens_today == 7


async def test_replica_that_ends_tells_what_it_owes() -> None:
    async with replicas(2, tokens_per_day=100, concurrency=2) as (database, (one, two), _):
        await one.enter("a")
        one.release("a", 60)
        await one.link.close()
        assert database.limiter.standing("a").tokens_today == 60
        assert (database.leases["a"], database.replicas) == ({"0": 0}, {"1"})
        assert two.link.is_up
