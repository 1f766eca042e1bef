"""Usage records in a database: SQLite, and a real PostgreSQL that is killed under load."""

from __future__ import annotations

import json
import logging
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from click.testing import CliRunner
from postgres import Postgres, running_postgres
from support import Served, chat, eventually, running, serving

from serve.engine.echo import EchoEngine
from serve.keys import ApiKey, Scope, digest_of, write_keys
from serve.records.writer import RecordWriter
from trimaran.cli import main

COMPLETIONS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as found:
        yield found


def writer(served: Served) -> RecordWriter:
    return served.app.state.records


def rows(file: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(file) as connection:
        connection.row_factory = sqlite3.Row
        found = [dict(row) for row in connection.execute("SELECT * FROM usage ORDER BY received_at")]
    connection.close()
    return found


def test_records_hold_one_row_for_each_request(tmp_path: Path) -> None:
    file = tmp_path / "usage.db"
    settings: dict[str, Any] = {"api_keys": ("one",), "usd_per_hour": 3600.0, "records_url": f"sqlite:///{file}"}
    with (
        serving(**settings) as served,
        httpx.Client(base_url=served.url, headers={"x-api-key": "one", "x-request-id": "mine"}) as client,
    ):
        answers = [
            client.post(COMPLETIONS, json=chat("abcd")),
            client.post(COMPLETIONS, json=chat("abcd", stream=True, n=2)),
            client.post(COMPLETIONS, json=chat("a") | {"model": "other\0"}),
            client.post("/v1/messages", json={**chat("ab"), "max_tokens": 9}),
            client.get("/v1/models"),
            client.post(COMPLETIONS, json=chat("a"), headers={"x-api-key": "wrong"}),
            client.post("/nowhere", json={}),
        ]
        eventually(lambda: writer(served).num_written == 5)
        kept = rows(file)

    assert [answer.status_code for answer in answers] == [200, 200, 404, 200, 200, 401, 404]
    assert [row["status"] for row in kept] == [200, 200, 404, 200, 404]
    assert len({row["id"] for row in kept}) == 5
    assert {row["request_id"] for row in kept} == {"mine"}
    assert [(row["prompt_tokens"], row["completion_tokens"]) for row in kept[:2]] == [(4, 5), (4, 10)]
    assert [row["is_stream"] for row in kept[:2]] == [0, 1]
    assert [row["route"] for row in kept] == [COMPLETIONS] * 3 + ["/v1/messages", "unknown"]
    assert kept[0]["caller"].startswith("key-")
    assert kept[0]["cost_usd"] == pytest.approx(kept[0]["machine_ms"] / 1000, abs=1e-5)
    assert 0 < kept[0]["machine_ms"] <= kept[0]["total_ms"]
    assert (kept[2]["error_code"], kept[2]["cost_usd"]) == ("model_not_found", None)


def test_records_hold_one_row_for_a_response_in_the_background(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it ends well, is cancelled, or is ended by a drain."""
    file, body = tmp_path / "usage.db", {"model": "echo", "input": "a" * 30, "background": True}
    settings: dict[str, Any] = {"records_url": f"sqlite:///{file}", "api_keys": "one", "drain_timeout_s": 0}
    caplog.set_level(logging.INFO, "serve.request")
    with (
        serving(EchoEngine(step_s=0.01), **settings) as served,
        httpx.Client(base_url=served.url, headers={"x-api-key": "one"}) as client,
    ):

        def begin(text: str) -> str:
            return "/v1/responses/" + client.post("/v1/responses", json=body | {"input": text}).json()["id"]

        ended, cancelled = begin("a" * 30), begin("b" * 4000)
        client.post(cancelled + "/cancel")
        eventually(lambda: client.get(ended).json()["status"] == "completed")
        begin("c" * 4001)
        page = client.get("/metrics").text
    found = [row for row in rows(file) if row["route"] == "/v1/responses"]
    lines = [line for line in caplog.records if getattr(line, "route", "") == "/v1/responses"]

    assert sorted((row["prompt_tokens"], row["status"]) for row in found) == [(30, 200), (4000, 499), (4001, 503)]
    assert len(lines) == 3
    whole = next(row for row in found if row["status"] == 200)
    assert (whole["completion_tokens"], whole["finish_reason"], whole["method"]) == (31, "stop", "POST")
    assert whole["caller"].startswith("key-")
    assert 0 < whole["ttft_ms"] < whole["total_ms"]
    assert whole["total_ms"] > 300  # 31 steps: until it ended, not until it was answered
    assert 'trimaran_http_requests_total{route="/v1/responses",status="200"} 1.0' in page


def test_records_that_wait_are_written_on_a_drain(tmp_path: Path) -> None:
    file = tmp_path / "usage.db"
    with running(SERVE_RECORDS_URL=f"sqlite:///{file}") as server:
        with httpx.Client(base_url=server.url) as client:
            for _ in range(20):
                assert client.post(COMPLETIONS, json=chat("a")).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    assert len(rows(file)) == 20


def test_records_go_into_a_new_file_when_theirs_was_taken_away(tmp_path: Path) -> None:
    """SQLite itself goes on to write into a file that has no name any more."""
    file = tmp_path / "usage.db"
    with serving(records_url=f"sqlite:///{file}") as served, httpx.Client(base_url=served.url) as client:
        for number in (1, 2):
            assert client.post(COMPLETIONS, json=chat("a" * number)).status_code == 200
            eventually(lambda number=number: writer(served).num_written == number)
            assert [row["prompt_tokens"] for row in rows(file)] == [number]
            file.rename(tmp_path / f"old{number}.db")
        assert writer(served).num_dropped == 0


def test_records_that_find_no_room_are_dropped_and_counted(tmp_path: Path) -> None:
    """The database is a folder that cannot be a file, so that it is away for good."""
    (tmp_path / "usage.db").mkdir()
    with (
        serving(records_url=f"sqlite:///{tmp_path}/usage.db", records_buffer=3) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        assert [client.post(COMPLETIONS, json=chat("a")).status_code for _ in range(5)] == [200] * 5
        eventually(lambda: writer(served).num_dropped == 2)
        page = client.get("/metrics").text

    assert "trimaran_usage_records_dropped_total 2.0" in page
    assert "trimaran_usage_records_waiting 3.0" in page
    assert "trimaran_usage_records_written_total 0.0" in page


def test_records_survive_a_postgresql_that_is_killed_under_load(postgres: Postgres) -> None:
    statuses: list[int] = []
    is_over = threading.Event()

    def ask(base_url: str) -> None:
        with httpx.Client(base_url=base_url, timeout=30) as client:
            while not is_over.is_set():
                statuses.append(client.post(COMPLETIONS, json=chat("ab", max_tokens=2)).status_code)
                time.sleep(0.005)

    with serving(records_url=postgres.url) as served:
        callers = [threading.Thread(target=ask, args=(served.url,)) for _ in range(3)]
        for caller in callers:
            caller.start()
        for _ in range(2):
            before = writer(served).num_written
            eventually(lambda before=before: writer(served).num_written > before + 20)
            postgres.kill()
            num_answered = len(statuses)
            eventually(lambda before=num_answered: len(statuses) > before + 20)
            postgres.start()
        is_over.set()
        for caller in callers:
            caller.join()
        eventually(lambda: writer(served).num_waiting == 0, timeout_s=20)
        found = postgres.ask("SELECT count(*), count(DISTINCT id), count(DISTINCT request_id) FROM usage")

    assert set(statuses) == {200}
    assert found == "|".join([str(len(statuses))] * 3)
    assert (writer(served).num_written, writer(served).num_dropped) == (len(statuses), 0)


def test_usage_command_prints_what_postgresql_holds(postgres: Postgres) -> None:
    count = postgres.ask("SELECT count(*) FROM usage WHERE caller = 'anonymous'")
    done = CliRunner().invoke(main, ["usage"], env={"SERVE_RECORDS_URL": postgres.url})

    assert done.exit_code == 0, done.output
    line = next(line.split() for line in done.output.splitlines() if line.startswith("anonymous "))
    assert line[1].replace(",", "") == count
    assert "█" in done.output


def test_usage_is_for_admins_over_http(tmp_path: Path) -> None:
    admin, user = "from-the-environment", "user"
    file, scopes = tmp_path / "keys.json", frozenset({Scope.INFERENCE})
    write_keys(file, [ApiKey(digest=digest_of(user.encode()), name="app", scopes=scopes)])
    with (
        serving(records_url=f"sqlite:///{tmp_path}/usage.db", api_keys=admin, api_keys_file=file) as served,
        httpx.Client(base_url=served.url, headers={"x-api-key": admin}) as client,
    ):
        for _ in range(3):
            client.post(COMPLETIONS, json=chat("ab"), headers={"x-api-key": user})
        eventually(lambda: writer(served).num_written == 3)
        (sums,) = client.get("/usage", params={"days": 2}).json()["usage"]
        statuses = [
            client.get("/usage", headers={"x-api-key": user}).status_code,
            client.get("/usage", headers={"x-api-key": "wrong"}).status_code,
            client.get("/usage", params={"days": 0}).status_code,
        ]
        environment = {"TRIMARAN_API_KEY": admin, "SERVE_RECORDS_URL": served.url}
        shown = CliRunner().invoke(main, ["usage", "--json"], env=environment)
        refused = CliRunner().invoke(main, ["usage"], env=environment | {"TRIMARAN_API_KEY": user})
        operation = client.get("/openapi.json").json()["paths"]["/usage"]["get"]

    assert (sums["caller"], sums["requests"], sums["prompt_tokens"], sums["completion_tokens"]) == ("app", 3, 6, 9)
    assert (sums["route"], sums["model"]) == (COMPLETIONS, "echo")
    assert statuses == [403, 401, 400]
    assert {"HTTPBearer": ["admin"]} in operation["security"]
    assert json.loads(shown.output)["completion_tokens"] == 9
    assert (refused.exit_code, "the scope admin" in refused.output) == (1, True)


def test_usage_is_not_there_without_a_database(echo: Served) -> None:
    assert httpx.get(echo.url + "/usage").status_code == 404
    done = CliRunner().invoke(main, ["usage", "--url", echo.url])
    assert (done.exit_code, "start it with SERVE_RECORDS_URL" in done.output) == (1, True)


def test_usage_command_says_why_there_is_nothing(postgres: Postgres, tmp_path: Path) -> None:
    runner = CliRunner()
    for url, reason in [
        (f"sqlite:///{tmp_path}/none.db", "there is no file"),
        (postgres.url.replace("/usage", "/other"), "does not exist"),
        ("postgresql://u:secret-password@127.0.0.1:9/x", "cannot be read"),
        ("mysql://u:secret-password@h/x", "SERVE_RECORDS_URL is no address of a database"),
    ]:
        done = runner.invoke(main, ["usage", "--url", url])
        assert done.exit_code in (1, 2), url
        assert reason in done.output
        assert "secret-password" not in done.output
