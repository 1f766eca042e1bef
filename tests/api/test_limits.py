"""Allowances over HTTP: 429 with Retry-After and OpenAI's headers, for each key alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from support import chat, eventually, openai_error, serving

from serve.api.app import create_app
from serve.engine.echo import EchoEngine
from serve.errors import ConfigError
from serve.limits import DAY_S, Limiter
from serve.settings import Settings

COMPLETIONS = "/v1/chat/completions"


def test_limits_answer_429_with_the_seconds_to_wait() -> None:
    with serving(limit_requests_per_minute=2) as served, httpx.Client(base_url=served.url) as client:
        answers = [client.post(COMPLETIONS, json=chat("a")) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert all(answer.headers["x-ratelimit-limit-requests"] == "2" for answer in answers)
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert openai_error(answers[2].json())["code"] == "rate_limit_exceeded"
    assert "2 requests per minute" in answers[2].json()["error"]["message"]
    assert "x-ratelimit-limit-tokens" not in answers[0].headers


@pytest.mark.parametrize("stream", [False, True])
def test_limits_count_the_tokens_of_prompt_and_completion(stream: bool) -> None:
    with serving(limit_tokens_per_minute=6) as served, httpx.Client(base_url=served.url) as client:
        first = client.post(COMPLETIONS, json=chat("abcdefg", stream=stream))  # 7 and 8, the end being a token too
        limiter: Limiter = served.app.state.limiter
        eventually(lambda: served.on_loop(lambda: limiter.remaining("anonymous"))[0].remaining == 0)
        second = client.post(COMPLETIONS, json=chat("a"))

    assert (first.status_code, first.headers["x-ratelimit-remaining-tokens"]) == (200, "6")
    assert (second.status_code, second.headers["x-ratelimit-remaining-tokens"]) == (429, "0")
    assert 60 < int(second.headers["retry-after"]) <= 100  # 9 tokens of debt, and one more


def test_limits_are_for_each_key_alone() -> None:
    with (
        serving(api_keys=("one", "two"), limit_requests_per_minute=1) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        statuses = [
            client.post(COMPLETIONS, json=chat("a"), headers={"x-api-key": key}).status_code
            for key in ("one", "one", "two", "wrong", "two")
        ]
    assert statuses == [200, 429, 200, 401, 429]


def test_limits_leave_reading_and_health_alone() -> None:
    with serving(limit_requests_per_minute=1) as served, httpx.Client(base_url=served.url) as client:
        for _ in range(5):
            assert client.get("/v1/models").status_code == 200
            assert client.get("/health").status_code == 200


def test_limits_bound_what_one_caller_runs_at_once() -> None:

    with serving(EchoEngine(step_s=0.05), limit_concurrency=1) as served:
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(httpx.post(served.url + COMPLETIONS, json=chat("a" * 20), timeout=30).status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 429, 429]
        ask()
        assert statuses[-1] == 200


def test_openai_client_waits_off_a_limit() -> None:
    """Retry-After is true: one retry is enough."""
    with serving(limit_requests_per_minute=60, limit_tokens_per_minute=120) as served:
        client = openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=1)
        for _ in range(2):
            messages: list = [{"role": "user", "content": "a" * 60}]
            answer = client.chat.completions.create(model="echo", messages=messages)
            assert answer.choices[0].message.content == "a" * 60


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, chat("a b c")),
        ("/v1/completions", {"model": "echo", "prompt": "a b c"}),
        ("/v1/responses", {"model": "echo", "input": "a b c"}),
        ("/v1/messages", {**chat("a b c"), "max_tokens": 9}),
    ],
)
def test_limits_hold_on_every_route_that_generates(path: str, body: dict[str, Any]) -> None:
    with serving(limit_tokens_per_minute=3) as served, httpx.Client(base_url=served.url) as client:
        assert client.post(path, json=body).status_code == 200
        refused = client.post(path, json=body)

    assert (refused.status_code, refused.json()["error"]["type"] != "") == (429, True)
    assert int(refused.headers["retry-after"]) >= 1
    assert ("type" in refused.json()) == (path == "/v1/messages")  # Anthropic's own shape of an error


def test_limits_count_a_response_in_the_background_until_it_ends() -> None:
    """Its own request has long ended; its place and its tokens are the caller's all the same."""
    body = {"model": "echo", "input": " ".join("abcdefgh"), "background": True}
    with (
        serving(EchoEngine(step_s=0.05), limit_concurrency=1, limit_tokens_per_minute=9) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        begun = client.post("/v1/responses", json=body)
        while_running = client.post("/v1/responses", json=body)
        eventually(lambda: client.get(f"/v1/responses/{begun.json()['id']}").json()["status"] == "completed")
        afterwards = client.post("/v1/responses", json=body)

    assert (begun.json()["status"], while_running.status_code, afterwards.status_code) == ("in_progress", 429, 429)
    assert "running" in while_running.json()["error"]["message"]
    assert "tokens per minute" in afterwards.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_limits_count_dollars_of_machine_time(stream: bool) -> None:
    settings: dict[str, Any] = {"limit_usd_per_day": 0.0123, "usd_per_hour": 10_000}
    with serving(EchoEngine(step_s=0.01), **settings) as served, httpx.Client(base_url=served.url) as client:
        first = client.post(COMPLETIONS, json=chat("abcd", stream=stream))
        limiter: Limiter = served.app.state.limiter
        eventually(lambda: served.on_loop(lambda: limiter.remaining("anonymous"))[0].remaining == 0)
        refused = client.post(COMPLETIONS, json=chat("a"))
        left_s = DAY_S - time.time() % DAY_S

    assert (first.status_code, first.headers["x-ratelimit-limit-usd-day"]) == (200, "0.0123")
    assert (refused.status_code, refused.headers["x-ratelimit-remaining-usd-day"]) == (429, "0")
    assert abs(int(refused.headers["retry-after"]) - left_s) < 30
    assert "$0.0123 of machine time per day" in openai_error(refused.json())["message"]


@pytest.mark.parametrize("limit", [{"limit_tokens_per_day": 9}, {"limit_usd_per_day": 1e-6, "usd_per_hour": 10_000}])
def test_limits_of_a_day_outlive_a_process_with_a_database(limit: dict[str, float], tmp_path: Path) -> None:
    settings: dict[str, Any] = {**limit, "records_url": f"sqlite:///{tmp_path}/usage.db", "api_keys": ("one", "two")}
    statuses: list[int] = []
    for keys in (("one",), ("one", "two")):
        with serving(**settings) as served:
            for key in keys:
                answer = httpx.post(served.url + COMPLETIONS, json=chat("abcdefg"), headers={"x-api-key": key})
                statuses.append(answer.status_code)
    assert statuses == [200, 429, 200]


@pytest.mark.parametrize("limit", ["limit_tokens_per_minute", "limit_tokens_per_day", "limit_usd_per_day"])
def test_gateway_refuses_limits_of_tokens_that_it_cannot_count(limit: str) -> None:
    settings: dict[str, Any] = {"engine": "remote", "remote_url": "http://127.0.0.1:9", "usd_per_hour": 1, limit: 5}
    with pytest.raises(ConfigError, match=f"SERVE_{limit.upper()}"):
        create_app(Settings(**{**settings, "_env_file": None}))


def test_gateway_counts_requests() -> None:
    with (
        serving() as model,
        serving(engine="remote", remote_url=model.url, limit_requests_per_minute=1) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        assert [client.post(COMPLETIONS, json=chat("a")).status_code for _ in range(2)] == [200, 429]
