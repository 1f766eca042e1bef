"""The whole answer: text, finish reason, usage, and the fields that change them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import chat, openai_error, serving

COMPLETIONS = "/v1/chat/completions"

# U+FFFD stands for an incomplete character, and surrogates are no characters.
TEXTS = st.text(
    st.one_of(
        st.sampled_from("ab, \n"),
        st.sampled_from("👩‍👦🫠🧿🇩🇪é\u0301日本語한글\u2028\x00"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"),
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture(scope="module")
def strict() -> Iterator[httpx.Client]:
    with serving(strict=True) as served, httpx.Client(base_url=served.url) as client:
        yield client


def ask(client: httpx.Client, text: str, **fields: Any) -> dict[str, Any]:
    response = client.post(COMPLETIONS, json=chat(text, **fields))
    assert response.status_code == 200, response.text
    return response.json()


def content(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def test_chat_answers_with_every_required_field(client: httpx.Client) -> None:
    answer = ask(client, "hello")

    assert set(answer) >= {"id", "object", "created", "model", "choices", "usage"}
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@settings(max_examples=30, deadline=None)
@given(text=TEXTS, max_tokens=st.integers(1, 200), stop=st.none() | st.text("ab, \n日", min_size=1, max_size=3))
@example(text="🧿🧿🧿", max_tokens=6, stop=None)
@example(text="1, 2, 3, 4, 5, 6", max_tokens=40, stop=", 5")
def test_chat_text_is_the_tokens_up_to_the_stop_string(
    client: httpx.Client, text: str, max_tokens: int, stop: str | None
) -> None:
    tokens = text.encode()
    whole = tokens[:max_tokens].decode(errors="ignore")  # drops only an unfinished character at the end
    is_stopped = stop is not None and stop in whole

    answer = ask(client, text, max_tokens=max_tokens, stop=stop)

    assert content(answer) == (whole.partition(stop)[0] if stop else whole)
    is_ended = is_stopped or max_tokens > len(tokens)
    assert answer["choices"][0]["finish_reason"] == ("stop" if is_ended else "length")


@pytest.mark.parametrize(
    ("fields", "reason", "text"),
    [
        ({}, "stop", "one two three"),
        ({"max_tokens": 13}, "length", "one two three"),
        ({"max_tokens": 3}, "length", "one"),
        ({"stop": " t"}, "stop", "one"),
        ({"stop": ["zzz", " three"]}, "stop", "one two"),
        ({"stop": "two", "max_tokens": 7}, "stop", "one "),
        ({"stop": []}, "stop", "one two three"),
    ],
)
def test_chat_finish_reason_says_why_it_ended(
    client: httpx.Client, fields: dict[str, Any], reason: str, text: str
) -> None:
    """Case 8."""
    answer = ask(client, "one two three", **fields)

    assert (content(answer), answer["choices"][0]["finish_reason"]) == (text, reason)


def test_chat_releases_held_text_that_is_no_stop_string(client: httpx.Client) -> None:
    """Case 5: text that only looks like the start of a stop string, in the middle and at the end."""
    text = "a\n\nb\nc\n\nEN\n\nd\n\nEN"

    assert content(ask(client, text, stop="\n\nEND")) == text


def test_chat_max_tokens_null_means_the_rest_of_the_context(client: httpx.Client) -> None:
    """Case 29."""
    assert content(ask(client, "x" * 4000, max_tokens=None)) == "x" * 4000


@pytest.mark.parametrize("value", [0, -1, 2.7, "abc", "5", True, [], 1e9])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_chat_max_tokens_refuses_what_is_no_count(client: httpx.Client, name: str, value: Any) -> None:
    """Case 29."""
    response = client.post(COMPLETIONS, json=chat("a", **{name: value}))

    assert response.status_code == 400
    assert openai_error(response.json())["param"] == name


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_chat_max_tokens_beyond_the_context_says_the_numbers(client: httpx.Client, name: str) -> None:
    """Case 29."""
    response = client.post(COMPLETIONS, json=chat("abc", **{name: 1_000_000_000}))

    error = openai_error(response.json())
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", name)
    assert all(number in error["message"] for number in ("8192", "1000000000", "8189"))


@pytest.mark.parametrize("stream", [False, True])
def test_chat_refuses_a_prompt_beyond_the_context(client: httpx.Client, stream: bool) -> None:
    """Case 28: before any work, with the numbers; the server goes on."""
    response = client.post(COMPLETIONS, json=chat("word " * 9000, max_tokens=7, stream=stream))

    error = openai_error(response.json())
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert all(number in error["message"] for number in ("8192", "45000", "7"))
    assert content(ask(client, "still here")) == "still here"


def test_chat_fills_the_context_to_the_last_token(client: httpx.Client) -> None:
    fits = ask(client, "x" * 8191)
    response = client.post(COMPLETIONS, json=chat("x" * 8192))

    assert fits["choices"][0]["finish_reason"] == "length"
    assert fits["usage"]["total_tokens"] == 8192
    assert response.status_code == 400
    assert openai_error(response.json())["code"] == "context_length_exceeded"


@pytest.mark.parametrize("value", [0, 0.0, 1, 2])
def test_chat_temperature_takes_its_range(client: httpx.Client, value: float) -> None:
    """Case 30: 0 is greedy."""
    assert content(ask(client, "warm", temperature=value)) == "warm"


@pytest.mark.parametrize("raw", ["-1", "5", "2.0001", '"hot"', "NaN", "Infinity", "-Infinity", "1e400", "true", "[]"])
def test_chat_temperature_refuses_the_rest(client: httpx.Client, raw: str) -> None:
    """Case 30."""
    body = json.dumps(chat("a", temperature="HERE")).replace('"HERE"', raw)

    response = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400
    openai_error(response.json())


def test_chat_joins_text_parts_with_a_line_break(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]

    assert content(ask(client, parts)) == "A\nB"  # pyright: ignore[reportArgumentType]


def test_chat_accepts_unknown_fields_and_names_them(client: httpx.Client) -> None:
    response = client.post(COMPLETIONS, json=chat("a", zeta=1, frobnicate={"deep": [1]}, user="me", **{"\r\nx": 1}))

    assert response.status_code == 200
    assert response.headers["x-ignored-parameters"] == "frobnicate, zeta"
    assert "x-ignored-parameters" not in client.post(COMPLETIONS, json=chat("a", user="me")).headers


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"zeta": 1}, "zeta"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
            "messages[0].content[0].cache_control",
        ),
    ],
)
def test_chat_refuses_unknown_fields_when_strict(strict: httpx.Client, fields: dict[str, Any], name: str) -> None:
    response = strict.post(COMPLETIONS, json=chat("a") | fields)

    assert response.status_code == 400
    assert openai_error(response.json())["param"] == name


def test_chat_strict_takes_every_known_field(strict: httpx.Client) -> None:
    fields = {"user": "me", "top_k": 5, "guided_json": None, "use_beam_search": False, "store": False, "n": 1}

    assert strict.post(COMPLETIONS, json=chat("a", **fields)).status_code == 200
    assert strict.post(COMPLETIONS, json=chat("a", zeta=None)).status_code == 200  # null is left out


def test_chat_max_completion_tokens_wins(client: httpx.Client) -> None:
    assert content(ask(client, "abcdef", max_tokens=5, max_completion_tokens=2)) == "ab"


def test_chat_keeps_nul_and_line_separators(client: httpx.Client) -> None:
    """Case 27."""
    assert content(ask(client, "a\x00b\u2028c")) == "a\x00b\u2028c"
