"""Limits of several server processes together, through a real PostgreSQL that is killed; so is one of the servers."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from postgres import Postgres, running_postgres
from support import Running, chat, eventually, openai_error, running

from serve.limits import Allowance
from serve.sharing.store import Answer, Ask

COMPLETIONS = "/v1/chat/completions"
PER_MINUTE, TOKENS, AT_ONCE = 12, 60, 3
KEYS = ("requests", "tokens", "places", "outage", "day")
LEASE_S = 1.5
PATIENT = f"""
import serve.sharing.store as store
store.LEASE_S = {LEASE_S}
import serve.sharing.link as link
link.WAIT_S, link.STEADY_WAIT_S = 2.0, 1.0
"""
"""Short leases, and no busy machine is taken for a slow database."""


@dataclass(frozen=True)
class Replica:
    server: Running
    client: httpx.Client

    def post(self, key: str, text: str = "a", **fields: Any) -> httpx.Response:
        return self.client.post(COMPLETIONS, json=chat(text, **fields), headers={"x-api-key": key})

    @property
    def num_lost(self) -> int:
        """How often it has lost the database."""
        return self.server.log.count("Limits are not shared")

    def metric(self, name: str) -> float:
        page = self.client.get("/metrics", headers={"x-api-key": KEYS[0]}).text
        found = re.search(rf"^trimaran_{name} (\S+)$", page, re.MULTILINE)
        assert found, page
        return float(found[1])


@dataclass(frozen=True)
class Fleet:
    postgres: Postgres
    replicas: list[Replica]

    @property
    def is_shared(self) -> bool:
        """And each knows of all the others."""
        known = [(replica.metric("limits_shared"), replica.metric("limit_replicas")) for replica in self.replicas]
        return known == [(1, len(self.replicas))] * len(self.replicas)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Two servers and their database."""
    with running_postgres() as postgres, ExitStack() as stack:
        settings = {
            "SERVE_RECORDS_URL": postgres.url,
            "SERVE_LIMITS_SHARED": "true",
            "SERVE_API_KEYS": ",".join(KEYS),
            "SERVE_LIMIT_REQUESTS_PER_MINUTE": str(PER_MINUTE),
            "SERVE_LIMIT_TOKENS_PER_MINUTE": str(TOKENS),
            "SERVE_LIMIT_TOKENS_PER_DAY": "100000",
            "SERVE_LIMIT_CONCURRENCY": str(AT_ONCE),
        }
        servers = [stack.enter_context(running(before=PATIENT, **settings)) for _ in range(2)]
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=20)) for server in servers]
        found = Fleet(postgres, [Replica(*pair) for pair in zip(servers, clients, strict=True)])
        eventually(lambda: found.is_shared, timeout_s=30)
        yield found


@contextmanager
def holding(replica: Replica, key: str, num: int) -> Iterator[None]:
    """So many requests that are let in, and whose bodies never come."""
    at = urlsplit(replica.server.url)
    lines = ("POST /v1/chat/completions HTTP/1.1", "host: x", f"x-api-key: {key}", "content-length: 9")
    head = "\r\n".join((*lines, "content-type: application/json", "", "")).encode()
    with ExitStack() as stack:
        for _ in range(num):
            connection = stack.enter_context(socket.create_connection((at.hostname or "", at.port or 0)))
            connection.sendall(head)
        yield


def test_replicas_give_a_caller_its_requests_once(fleet: Fleet) -> None:
    answers: list[httpx.Response] = []
    began = time.monotonic()

    def ask(replica: Replica) -> None:
        answers.extend(replica.post("requests", max_tokens=1) for _ in range(PER_MINUTE))

    threads = [threading.Thread(target=ask, args=(replica,)) for replica in fleet.replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.monotonic() - began
    statuses = [answer.status_code for answer in answers]
    refused = next(answer for answer in answers if answer.status_code == 429)

    assert set(statuses) == {200, 429}
    assert PER_MINUTE <= statuses.count(200) <= PER_MINUTE + took_s * PER_MINUTE / 60
    assert refused.headers["x-ratelimit-limit-requests"] == str(PER_MINUTE)
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(refused.headers["retry-after"]) <= 60 / PER_MINUTE
    assert f"{PER_MINUTE} requests per minute" in openai_error(refused.json())["message"]
    assert fleet.replicas[0].post("day").headers["x-ratelimit-remaining-requests"] == str(PER_MINUTE - 1)
    assert fleet.replicas[1].post("day").headers["x-ratelimit-remaining-requests"] == str(PER_MINUTE - 2)


def test_replicas_add_up_tokens(fleet: Fleet) -> None:
    one, two = fleet.replicas
    before = one.post("tokens", "a" * 40)  # 81 tokens
    eventually(lambda: int(fleet.postgres.ask("SELECT max(day_tokens) FROM limit_caller")) >= 81)
    after = two.post("tokens")

    assert (before.status_code, after.status_code) == (200, 429)
    assert f"{TOKENS} tokens per minute" in openai_error(after.json())["message"]
    assert 15 < int(after.headers["retry-after"]) <= 22
    assert after.headers["x-ratelimit-remaining-tokens-day"] == str(100_000 - 81)


def test_table_counts_each_request_once_whoever_asks(fleet: Fleet) -> None:
    """Many connections at once, each in its own order of callers; the names are such as only an issuer makes."""
    from serve.records.limit_table import LimitTable

    names = ["z\0", "a" * 5000, "\ud800", "plain"]
    allowance = Allowance(requests_per_minute=40, tokens_per_day=10**9, usd_per_day=9.0)

    def ask(name: str, num_wanted: int = 1) -> Ask:
        return Ask(
            caller=name, num_wanted=num_wanted, num_running=0, requests=0, tokens=3, tokens_today=3, usd_today=0.01,
            known_tokens=1000, known_usd=1.0,
        )  # fmt: skip

    async def hammer(table: LimitTable, order: list[str]) -> Counter[str]:
        granted: Counter[str] = Counter()
        await table.open()
        for _ in range(25):
            for answer in await table.exchange([ask(name) for name in order]):
                granted[answer.caller] += answer.num_granted
        return granted

    async def hammer_all() -> tuple[Counter[str], list[Answer]]:
        tables = [LimitTable(fleet.postgres.url, allowance) for _ in range(4)]
        counts = await asyncio.gather(*(hammer(table, names[at:] + names[:at]) for at, table in enumerate(tables)))
        fleet.postgres.ask("UPDATE limit_caller SET day = day - 1 WHERE caller = 'plain'")
        answers = await tables[0].exchange([ask(name, 0) for name in names])
        for table in tables:
            await table.leave()
        return sum(counts, Counter()), answers

    began = time.monotonic()
    granted, answers = asyncio.run(hammer_all())
    flowed_back = (time.monotonic() - began) * 40 / 60
    assert set(granted) == set(names)
    assert all(40 <= num <= 40 + flowed_back for num in granted.values()), granted
    used = {answer.caller: (answer.tokens_today, round(answer.usd_today, 6)) for answer in answers}
    assert used == {**dict.fromkeys(names, (1303, 2.01)), "plain": (3, 0.01)}  # for plain it is another day


def test_replicas_go_on_while_postgresql_is_away(fleet: Fleet) -> None:
    began = time.monotonic()
    statuses: list[int] = []
    lost_before = [replica.num_lost for replica in fleet.replicas]  # a busy machine may start slowly

    def ask(times: int) -> None:
        for _ in range(times):
            statuses.extend(replica.post("outage", max_tokens=1).status_code for replica in fleet.replicas)

    ask(1)
    fleet.postgres.kill()
    ask(PER_MINUTE)
    alone = [replica.metric("limits_shared") for replica in fleet.replicas]
    fleet.postgres.start()
    eventually(lambda: fleet.is_shared, timeout_s=20)
    ask(1)
    took_s = time.monotonic() - began

    assert set(alone) == {0}
    assert set(statuses) == {200, 429}
    flowed_back = took_s * PER_MINUTE / 60
    forgotten = len(fleet.replicas)  # counts of the last moment before a crash are not on the disk
    assert PER_MINUTE - 1 <= statuses.count(200) <= PER_MINUTE + forgotten + flowed_back
    for replica, num_lost in zip(fleet.replicas, lost_before, strict=True):
        assert replica.num_lost == num_lost + 1, replica.server.log
        assert "Traceback" not in replica.server.log
        assert "secret-password" not in replica.server.log


def test_replica_that_is_killed_gives_its_places_back(fleet: Fleet) -> None:
    """The last test here: one server is gone."""
    one, victim = fleet.replicas
    leases = "SELECT max((value->>0)::int) FROM limit_caller, jsonb_each(running)"
    with holding(victim, "places", AT_ONCE):
        eventually(lambda: fleet.postgres.ask(leases) == str(AT_ONCE))
        time.sleep(1.1 * LEASE_S)  # they are renewed
        refused = one.post("places")
        victim.server.process.kill()
    eventually(lambda: one.post("places").status_code == 200)
    eventually(lambda: one.metric("limit_replicas") == 1)

    assert refused.status_code == 429
    assert f"{AT_ONCE} of your requests are running" in openai_error(refused.json())["message"]
    assert int(refused.headers["retry-after"]) == 1
