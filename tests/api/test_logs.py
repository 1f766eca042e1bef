"""One line for each request, and never a word of its text."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx2 as httpx
import pytest
import support
from support import chat, eventually, running

COMPLETIONS = "/v1/chat/completions"
MARK = "xyzzy-secret"
FIELDS = {
    "request_id", "route", "status", "model", "prompt_tokens", "completion_tokens", "finish_reason", "queue_ms",
    "ttft_ms", "total_ms",
}  # fmt: skip

FAILING: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": 10**9},
    {"tools": [{"type": "function", "function": {"name": MARK}}]},
    {"model": MARK},
    {"stop": [MARK, ""]},
    {"messages": [{"role": MARK, "content": MARK}]},
    {"messages": [{"role": "user", "content": [{"type": MARK, "text": MARK}]}]},
    {"user": 5, "metadata": {MARK: MARK}},
    {"messages": MARK},
    {"messages": [{"role": "user", "content": MARK * 2000}]},
]


def request_lines(log: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["logger"] == "serve.request"]


def send_all(client: httpx.Client) -> list[httpx.Response]:
    """Good and failing requests with the mark in every place where text can be."""
    head = {"content-type": "application/json"}
    return [
        client.post(COMPLETIONS, json=chat(MARK, user=MARK, **{MARK: MARK})),
        client.post(COMPLETIONS, json=chat(MARK, stream=True, stop="@")),
        *(client.post(COMPLETIONS, json=chat(MARK) | fields) for fields in FAILING),
        client.post(COMPLETIONS, content=f'{{"messages": "{MARK}'.encode(), headers=head),
        client.post(COMPLETIONS, content=f'"{MARK} \\ud800"'.encode(), headers=head),
        client.post(COMPLETIONS, content=MARK.encode(), headers={"content-type": "text/plain"}),
    ]


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_logs_never_hold_a_prompt(log_format: str) -> None:
    failure = (
        "from serve.engine import echo\nreal = echo.EchoRunner.step\n"
        "def step(self, batch):\n"
        "    if any(len(one.prompt_token_ids) == 99 for one in batch.sampled): raise ValueError('torn')\n"
        "    return real(self, batch)\n"
        "echo.EchoRunner.step = step"
    )
    environment = {"SERVE_LOG_FORMAT": log_format, "SERVE_LOG_LEVEL": "debug", "SERVE_DRAIN_TIMEOUT_S": "0.2"}
    with running(before=failure, **environment) as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            statuses = [response.status_code for response in send_all(client)]
            death = client.post(COMPLETIONS, json=chat(MARK.ljust(99, "!")))
        assert server.process.wait(60) == 70
        log = server.log

    assert statuses[:2] == [200, 200]
    assert set(statuses[2:]) <= {400, 404, 415}
    assert death.status_code == 503
    assert "torn" in log
    assert MARK not in log
    assert "".join(f"{byte}, " for byte in MARK.encode())[:20] not in log  # nor its tokens


def test_logs_have_one_line_for_each_request() -> None:
    with running() as server, httpx.Client(base_url=server.url, timeout=30) as client:
        responses = send_all(client)
        eventually(lambda: len(request_lines(server.log)) >= len(responses))
        client.get("/health")
        lines = request_lines(server.log)

    # A stream's line may come just after its last byte, and so after the next request's.
    by_id = {line["request_id"]: line for line in lines}
    assert len(lines) == len(responses)
    lines = [by_id[response.headers["x-request-id"]] for response in responses]
    assert [line["status"] for line in lines] == [response.status_code for response in responses]
    for line in lines[:2]:
        assert set(line) >= FIELDS
        assert (line["route"], line["model"], line["finish_reason"]) == (COMPLETIONS, "echo", "stop")
        assert line["prompt_tokens"] == len(MARK)
        assert line["completion_tokens"] == len(MARK) + 1
        assert line["queue_ms"] >= 0
        assert 0 <= line["ttft_ms"] <= line["total_ms"]
    assert all(line["total_ms"] >= 0 for line in lines)
    assert lines[3]["error_code"] == "context_length_exceeded"


def test_logs_of_a_stream_that_nobody_read_to_its_end_say_abort() -> None:
    step = "from serve.engine import echo; echo.EchoEngine.__init__.__kwdefaults__['step_s'] = 0.01"
    with running(before=step) as server:
        with httpx.stream("POST", server.url + COMPLETIONS, json=chat("x" * 4000, stream=True)) as response:
            pieces = response.iter_raw()  # kept: an iterator that is dropped closes the connection
            next(pieces)
        eventually(lambda: len(request_lines(server.log)) == 1)
        (line,) = request_lines(server.log)

    assert line["finish_reason"] == "abort"
    assert line["completion_tokens"] < 4000


def test_logs_cut_a_path_that_is_endless(echo: support.Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve.request")
    httpx.get(echo.url + "/" + "a" * 60_000)
    eventually(lambda: len(caplog.records) >= 1)

    (line,) = [record for record in caplog.records if record.name == "serve.request"]
    assert len(line.getMessage()) < 600
    assert getattr(line, "route").startswith("/aaaa")  # noqa: B009 - pyright knows no fields of a record


@pytest.mark.parametrize(
    "path", ["/a%0aforged line", "/a%0d%0aforged line", "/a%1b[31mforged", "/v1/models/x%0aforged"]
)
def test_logs_keep_a_request_on_its_line(echo: support.Served, caplog: pytest.LogCaptureFixture, path: str) -> None:
    """A path that a client made up must not look like lines of ours on a terminal."""
    caplog.set_level(logging.INFO, "serve.request")
    httpx.get(echo.url + path)
    eventually(lambda: len(caplog.records) >= 1)

    messages = [record.getMessage() for record in caplog.records if record.name == "serve.request"]
    assert len(messages) == 1
    assert messages[0].isprintable()
