"""Usage records without a server: which requests, which addresses, what the command prints; who had the machine."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ConfigError
from serve.machine_time import MachineTime
from serve.observe import RequestRecord
from serve.records.address import asyncpg_address, database_address
from serve.records.row import UsageRow, usage_row
from serve.records.writer import RecordWriter
from trimaran.usage import bar, chart_text, merged, table_text


def record(**fields: Any) -> RequestRecord:
    given: dict[str, Any] = {"request_id": "r", "method": "POST", "route": "/v1/x", "caller": "key-1", "status": 200}
    return RequestRecord(**{**given, **fields})


def row(**fields: Any) -> UsageRow:
    found = usage_row(record(**fields))
    assert found is not None
    return found


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.001, 50), st.integers(1, 8)), min_size=1, max_size=8))
def test_machine_time_of_all_requests_is_the_time_in_which_there_was_one(spans):
    """However they overlap; requests of as many sequences, at the same times, have as much."""
    now = 0.0
    machine = MachineTime(usd_per_hour=36.0, clock=lambda: now)
    changes = sorted(
        [(begin, 1, at) for at, (begin, _, _) in enumerate(spans)]
        + [(begin + length, 0, at) for at, (begin, length, _) in enumerate(spans)]
    )
    shares, had, busy_s, num_running = {}, {}, 0.0, 0
    for moment, is_begin, at in changes:
        busy_s += (moment - now) * bool(num_running)
        now = moment
        if is_begin:
            shares[at], num_running = machine.begin(spans[at][2]), num_running + 1
        elif at in shares:
            had[at], num_running = machine.end(shares[at]), num_running - 1
    assert sum(had.values()) == pytest.approx(busy_s, abs=1e-6)
    assert all(0 <= machine_s <= spans[at][1] + 1e-6 for at, machine_s in had.items())
    assert machine.cost_usd(100.0) == 1.0


@pytest.mark.parametrize(
    "fields",
    [{"caller": None}, {"method": "GET"}, {"method": "HEAD"}, {"status": 101, "method": "WEBSOCKET"}, {"status": None}],
)
def test_row_is_made_of_usage_alone(fields):
    assert usage_row(record(**fields)) is None


def test_row_takes_what_callers_send():
    found = row(endpoint=None, model="a\0\ud800" + "x" * 500, request_id="z" * 300)
    assert (found.route, found.model, found.request_id) == ("unknown", "a?" + "x" * 197, "z" * 200)
    assert found.received_at.tzinfo is UTC
    assert found.day == found.received_at.date()
    assert row().id != row().id


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("sqlite:///usage.db", "sqlite+aiosqlite:///usage.db"),
        ("sqlite:////tmp/usage.db", "sqlite+aiosqlite:////tmp/usage.db"),
        ("postgres://u:p%40@h:5/n?sslmode=require", "postgresql+asyncpg://u:p%40@h:5/n?ssl=require"),
        ("postgresql+psycopg://u@h/n", "postgresql+asyncpg://u@h/n"),
        ("postgresql:///n?host=/run/pg", "postgresql+asyncpg:///n?host=%2Frun%2Fpg"),
    ],
)
def test_address_is_as_the_drivers_want_it(url, address):
    assert database_address(url) == address


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("secret", "no address of a database"),
        ("mysql://u:secret@h/n", "no address of a database"),
        ("sqlite://secret", "sqlite:///usage.db"),
        ("sqlite:///", "sqlite:///usage.db"),
        ("sqlite:////no-such-folder/usage.db", "no folder /no-such-folder"),
        ("postgresql://u:secret@h", "names no database"),
        ("postgresql://u:secret@h:port/n", "no address of a database"),
        ("postgresql://u:secret@h/n?channel_binding=require", "channel_binding is not supported"),
    ],
)
def test_address_that_is_wrong_says_what_would_be_right(url, words):
    with pytest.raises(ConfigError, match=words) as caught:
        database_address(url)
    assert "secret" not in caught.value.message
    assert caught.value.param == "SERVE_RECORDS_URL"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("postgres://u:ssl=%40@h:5/n?sslmode=require", "postgresql://u:ssl=%40@h:5/n?sslmode=require"),
        ("postgresql+psycopg://u@h/n?ssl=prefer", "postgresql://u@h/n?sslmode=prefer"),
    ],
)
def test_address_is_as_asyncpg_takes_it_alone(url, address):
    assert asyncpg_address(url) == address
    assert "ssl=" in database_address(url)


def test_address_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trimaran\[records\]"):
        database_address("sqlite:///usage.db")


def test_store_keeps_a_row_once_however_often_it_is_written(tmp_path: Path):
    from serve.records.store import UsageStore

    rows = [row(prompt_tokens=at) for at in range(5)]

    async def write() -> Any:
        store = UsageStore(f"sqlite:///{tmp_path}/usage.db")
        await store.migrate()
        await store.migrate()
        for some in (rows[:3], rows, rows[2:]):
            await store.write(some)
        found = await store.sums(date(2020, 1, 1), ["caller"])
        await store.close()
        return found

    (sums,) = asyncio.run(write())
    assert (sums["requests"], sums["prompt_tokens"], sums["failed"]) == (5, 10, 0)


def test_migrations_make_the_table_that_is_written(tmp_path: Path):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from sqlalchemy import create_engine

    from serve.records.store import UsageStore
    from serve.records.table import metadata

    async def migrate() -> None:
        store = UsageStore(f"sqlite:///{tmp_path}/usage.db")
        await store.migrate()
        await store.close()

    asyncio.run(migrate())
    engine = create_engine(f"sqlite:///{tmp_path}/usage.db")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": "trimaran_version"})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == "0002"
    engine.dispose()


def test_store_writes_into_the_database_of_a_later_version(tmp_path: Path):
    """Whoever goes back to this version keeps its records."""
    import sqlite3

    from serve.records.store import UsageStore

    async def write(at: int) -> Any:
        store = UsageStore(f"sqlite:///{tmp_path}/usage.db")
        await store.migrate()
        await store.write([row(prompt_tokens=at)])
        found = await store.sums(date(2020, 1, 1), ["caller"])
        await store.close()
        return found[0]["requests"]

    assert asyncio.run(write(1)) == 1
    connection = sqlite3.connect(tmp_path / "usage.db")
    connection.execute("UPDATE trimaran_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    assert asyncio.run(write(2)) == 2


def test_writer_counts_what_was_never_written(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "usage.db").mkdir()
    writer = RecordWriter(f"sqlite:///{tmp_path}/usage.db", max_waiting=2)
    for _ in range(3):
        writer.put(record())
    writer.put(record(method="GET"))
    assert (writer.num_waiting, writer.num_dropped) == (2, 1)
    with caplog.at_level(logging.INFO):
        writer.start()
        asyncio.run(writer.close(timeout_s=0.2))
    assert "3 usage records were not written" in caplog.text


def test_usage_table_has_a_line_for_each_group_and_one_for_all():
    sums: dict[str, Any] = {
        "requests": 1200, "failed": 2, "prompt_tokens": 10, "cached_tokens": 0, "completion_tokens": 7, "ttft_ms": 12.4,
        "machine_ms": 1500.0, "cost_usd": 0.25,
    }  # fmt: skip
    lines = table_text("caller", [{"caller": "ci", **sums}, {"caller": "app", **sums, "cost_usd": None}]).splitlines()
    assert lines[1].split() == ["ci", "1,200", "2", "10", "0", "7", "12", "1.5", "0.2500"]
    assert lines[2].split()[-1] == "1.5"
    assert lines[3].split() == ["total", "2,400", "4", "20", "0", "14", "12", "3.0", "0.2500"]
    assert len({len(line) for line in (lines[0], lines[1], lines[3])}) == 1


def test_usage_of_a_server_is_summed_by_fewer_columns():
    sums: dict[str, Any] = {
        "requests": 1, "failed": 0, "prompt_tokens": 2, "cached_tokens": 0, "completion_tokens": 3, "ttft_ms": None,
        "machine_ms": 1.0, "cost_usd": None,
    }  # fmt: skip
    found = [
        {"caller": "b", "day": date(2030, 1, 1), **sums},
        {"caller": "a", "day": date(2030, 1, 1), **sums},
        {"caller": "b", "day": date(2030, 1, 2), **sums, "requests": 3, "ttft_ms": 8.0},
    ]
    first, second = merged(found, ("caller",))
    assert (first["caller"], first["requests"], first["ttft_ms"], first["cost_usd"]) == ("a", 1, None, None)
    assert (second["caller"], second["requests"], second["ttft_ms"], second["machine_ms"]) == ("b", 4, 8.0, 2.0)
    assert len(merged(found, ("caller", "day"))) == 3


def test_usage_chart_shows_each_day_of_each_key():
    today = datetime.now(UTC).date()
    chart = [{"caller": f"k{at:02}", "day": today, "prompt_tokens": at, "completion_tokens": at} for at in range(12)]
    lines = chart_text(chart, today, 1).splitlines()
    assert lines[0] == "k11"
    assert lines[1].split() == [f"{today:%m-%d}", "█" * 40, "22"]
    assert lines[-1] == "and 2 more"
    assert (bar(0, 9), bar(1, 10**6), bar(9, 9)) == ("", "▏", "█" * 40)
