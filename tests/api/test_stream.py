"""Server-sent events: framing, and that a stream folded is the whole answer."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import chat, joined, openai_error, scripted_engine, serving, sse_chunks, sse_data

from serve.engine.base import EngineConfig, StepOutput
from serve.engine.echo import EchoRunner
from serve.engine.scheduler import Batch
from serve.engine.worker import StepEngine
from serve.errors import OutOfMemory

COMPLETIONS = "/v1/chat/completions"
TEXTS = st.text(
    st.one_of(
        st.sampled_from("ab, \n"),
        st.sampled_from("👩‍👦🫠🧿🇩🇪é\u0301日本語\u2028\x85"),
        st.characters(exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=40,
)
STOPS = st.none() | st.text("ab, \n日", min_size=1, max_size=3) | st.lists(st.text("ab", min_size=1), max_size=4)


def stream(client: httpx.Client, text: str, **fields: Any) -> str:
    response = client.post(COMPLETIONS, json=chat(text, stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return response.content.decode()


def finish_reasons(chunks: list[dict[str, Any]]) -> list[str]:
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    return [reason for reason in reasons if reason is not None]


@settings(max_examples=30, deadline=None)
@given(text=TEXTS, max_tokens=st.none() | st.integers(1, 120), stop=STOPS)
@example(text="Repeat exactly: 👩‍👩‍👧‍👦🫠", max_tokens=24, stop=None)
@example(text="🧿🧿🧿🧿🧿🧿🧿", max_tokens=6, stop=None)
@example(text="1, 2, 3, 4, 5, 6", max_tokens=40, stop=[", 5"])
@example(text="a\n\n\n\nEN\nb\n\nEN", max_tokens=40, stop="\n\nEND")
def test_stream_folded_equals_the_whole_answer(
    client: httpx.Client, text: str, max_tokens: int | None, stop: str | list[str] | None
) -> None:
    """Cases 1, 2, 4, 5, 8."""
    fields: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop}
    whole = client.post(COMPLETIONS, json=chat(text, **fields)).json()
    chunks = sse_chunks(stream(client, text, **fields, stream_options={"include_usage": True}))

    assert joined(chunks) == whole["choices"][0]["message"]["content"]
    assert finish_reasons(chunks) == [whole["choices"][0]["finish_reason"]]
    assert chunks[-1]["usage"] == whole["usage"]
    if "\ufffd" not in text:
        assert not any("\ufffd" in joined([chunk]) for chunk in chunks)


def test_stream_leaks_nothing_of_a_stop_string(client: httpx.Client) -> None:
    """Case 4."""
    assert joined(sse_chunks(stream(client, "1, 2, 3, 4, 5, 6", stop=[", 5"]))) == "1, 2, 3, 4"


def test_stream_releases_held_text(client: httpx.Client) -> None:
    """Case 5."""
    text = "a\nb\n\nc\n\nEN\nd\n\nEN"

    assert joined(sse_chunks(stream(client, text, stop="\n\nEND"))) == text


@pytest.mark.parametrize(("fields", "reason"), [({}, "stop"), ({"max_tokens": 2}, "length"), ({"stop": "ll"}, "stop")])
def test_stream_has_exactly_one_finish_reason_on_its_last_choice(
    client: httpx.Client, fields: dict[str, Any], reason: str
) -> None:
    """Case 8."""
    chunks = sse_chunks(stream(client, "hello", **fields))

    assert finish_reasons(chunks) == [reason]
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    assert chunks[-1]["choices"][0]["delta"] == {}


def test_stream_chunks_carry_every_required_key(client: httpx.Client) -> None:
    """Case 9: null where there is nothing to say, never a missing key."""
    chunks = sse_chunks(stream(client, "hello"))

    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    for chunk in chunks:
        assert set(chunk) == {
            "id", "object", "created", "model", "system_fingerprint", "service_tier", "choices"
        }  # fmt: skip
        assert [set(choice) for choice in chunk["choices"]] == [{"index", "delta", "logprobs", "finish_reason"}]
        assert chunk["choices"][0]["logprobs"] is None


def test_stream_says_the_role_once_and_first(client: httpx.Client) -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in sse_chunks(stream(client, "hello"))]

    assert deltas[0] == {"role": "assistant", "content": ""}
    assert not any("role" in delta for delta in deltas[1:])


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
def test_stream_has_no_usage_unless_asked(client: httpx.Client, options: dict[str, Any] | None) -> None:
    """Case 12."""
    assert '"usage"' not in stream(client, "hello", stream_options=options)


def test_stream_has_usage_once_when_asked(client: httpx.Client) -> None:
    """Case 12: one extra chunk without choices, before the end; null on the others."""
    chunks = sse_chunks(stream(client, "hello", stream_options={"include_usage": True}))

    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_stream_ends_with_one_done_and_nothing_after(client: httpx.Client) -> None:
    """Case 13, on the raw bytes; every event is one ``data`` line and a blank one."""
    body = stream(client, 'a "b"\n\r\u2028c')

    assert body.endswith("}\n\ndata: [DONE]\n\n")
    assert body.count("[DONE]") == 1
    events = body.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event and "\r" not in event for event in events)


def test_stream_asks_proxies_not_to_buffer(client: httpx.Client) -> None:
    response = client.post(COMPLETIONS, json=chat("a", stream=True, unheard=1))

    assert "no-cache" in response.headers["cache-control"]
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-ignored-parameters"] == "unheard"
    assert "content-length" not in response.headers


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"temperature": 3}, {"n": 129}, {"stream_options": 5}])
def test_stream_validates_before_the_headers(client: httpx.Client, fields: dict[str, Any]) -> None:
    """Cases 10 and 15."""
    response = client.post(COMPLETIONS, json=chat("a", stream=True, **fields))

    assert response.status_code == 400
    openai_error(response.json())


def test_stream_tells_a_late_error_as_an_event() -> None:
    """Case 15: valid JSON whatever the message, and no finish reason; the engine lives."""
    message = 'a "quoted"\nmessage'
    with (
        serving(scripted_engine([*b"ab", OutOfMemory(message)])) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        data = sse_data(stream(client, "x"))
        events = [json.loads(line) for line in data[:-1]]

        assert data[-1] == "[DONE]"
        assert data.count("[DONE]") == 1
        assert openai_error(events[-1])["message"] == message
        assert openai_error(events[-1])["code"] == "out_of_memory"
        assert joined(events[:-1]) == "ab"
        assert finish_reasons(events[:-1]) == []
        assert client.get("/health").status_code == 200
        assert client.post(COMPLETIONS, json=chat("x", max_tokens=2)).json()["choices"][0]["message"]["content"] == "ab"


class LateRunner(EchoRunner):
    """Its first token takes a third of a second, as after a long prompt."""

    def step(self, batch: Batch) -> StepOutput:
        if any(not sequence.output_token_ids for sequence in batch.sampled):
            time.sleep(0.3)
        return super().step(batch)


def test_stream_sends_comments_until_a_late_first_token() -> None:
    """Case 17."""
    config = EngineConfig()
    with (
        serving(StepEngine(config, LateRunner(config)), keep_alive_s=0.05) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        before, _, after = stream(client, "late").partition("data: ")

    assert before.count(": keep-alive\n\n") >= 2
    assert before.replace(": keep-alive\n\n", "") == ""
    assert ": keep-alive" not in after
    assert joined(sse_chunks("data: " + after)) == "late"


def test_stream_and_whole_answer_tell_broken_logits_alike() -> None:
    """Case 35."""
    with serving(scripted_engine([*b"ab", None])) as served, httpx.Client(base_url=served.url) as client:
        events = [json.loads(line) for line in sse_data(stream(client, "x"))[:-1]]
        response = client.post(COMPLETIONS, json=chat("x"))

        assert openai_error(events[-1])["code"] == "generation_failed"
        assert response.status_code == 500
        assert response.json() == events[-1]
        assert client.post(COMPLETIONS, json=chat("x", max_tokens=2)).status_code == 200


def test_stream_tells_the_death_of_the_engine_and_so_does_health() -> None:
    with (
        serving(scripted_engine([*b"ab", ValueError("step")]), drain_timeout_s=0.5) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        events = [json.loads(line) for line in sse_data(stream(client, "x"))[:-1]]

        assert openai_error(events[-1])["code"] == "engine_dead"
        assert finish_reasons(events[:-1]) == []
        for path, status in (("/health", 503), ("/ready", 503), ("/ping", 503)):
            assert client.get(path).status_code == status
        response = client.post(COMPLETIONS, json=chat("x"))
        assert response.status_code == 503
        assert openai_error(response.json())["code"] == "engine_dead"
