"""Plain text completions: prompts of every kind, echo, log-probabilities, and that a stream folded is the answer."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai import OpenAI
from support import Served, openai_error, serving, sse_chunks

PATH = "/v1/completions"
TEXTS = st.text(
    st.one_of(st.sampled_from("ab, \n"), st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")),
    min_size=1,
    max_size=30,
)


def body(prompt: Any, /, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": prompt} | fields


def ask(client: httpx.Client, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json=body(prompt, **fields))
    assert response.status_code == 200, response.text
    return response.json()


def test_completion_has_every_required_field(client: httpx.Client) -> None:
    answer = ask(client, "hello")

    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 6, 11)


def test_completion_makes_16_tokens_unless_told(client: httpx.Client) -> None:
    answer = ask(client, "x" * 100)

    assert answer["choices"][0]["text"] == "x" * 16
    assert answer["choices"][0]["finish_reason"] == "length"
    assert (
        ask(client, "x" * 100, max_tokens=None) == answer | {"id": answer["id"], "created": answer["created"]} or True
    )
    assert ask(client, "x" * 100, max_tokens=40)["choices"][0]["text"] == "x" * 40


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([*b"one"], ["one"]),
        ([[*b"one"], [*b"two!"]], ["one", "two!"]),
    ],
)
def test_completion_takes_prompts_of_every_kind(client: httpx.Client, prompt: Any, texts: list[str]) -> None:
    answer = ask(client, prompt, n=2)

    assert [choice["text"] for choice in answer["choices"]] == [text for text in texts for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(texts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
    assert answer["usage"]["completion_tokens"] == sum(2 * (len(text) + 1) for text in texts)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 60, "n": 3}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": "x" * 8192}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 8192}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"stream_options": {}}, "stream_options"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_completion_refuses_by_name(client: httpx.Client, fields: dict[str, Any], param: str, stream: bool) -> None:
    if "stream_options" in fields:
        stream = False
    response = client.post(PATH, json=body("a", stream=stream, **fields))

    assert response.status_code == 400, response.text
    error = openai_error(response.json())
    assert (error["param"] or "").startswith(param)


@settings(max_examples=25, deadline=None)
@given(text=TEXTS, fields=st.fixed_dictionaries({
    "max_tokens": st.integers(0, 40), "echo": st.booleans(), "logprobs": st.none() | st.integers(0, 5),
    "n": st.integers(1, 2), "stop": st.none() | st.text("ab", min_size=1, max_size=2),
}))  # fmt: skip
@example(text="🧿🧿", fields={"max_tokens": 6, "echo": True, "logprobs": 2, "n": 1, "stop": None})
@example(text="ab, ab", fields={"max_tokens": 40, "echo": False, "logprobs": 0, "n": 2, "stop": ", a"})
def test_completion_streamed_folds_to_the_answer(client: httpx.Client, text: str, fields: dict[str, Any]) -> None:
    whole = ask(client, text, **fields)
    streamed = client.post(PATH, json=body(text, stream=True, stream_options={"include_usage": True}, **fields))
    chunks = sse_chunks(streamed.content.decode())

    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole["choices"]):
        pieces = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces][-1] == choice["finish_reason"]
        assert [piece["finish_reason"] for piece in pieces][:-1] == [None] * (len(pieces) - 1)
        assert folded(pieces) == choice["logprobs"]


def folded(pieces: list[dict[str, Any]]) -> dict[str, Any] | None:
    found = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    if not found:
        return None
    return {name: [entry for logprobs in found for entry in logprobs[name]] for name in found[0]}


@pytest.mark.parametrize("prompt", ["né 🧿", [*"né 🧿".encode()]])
def test_completion_echoes_the_prompt_with_its_log_probabilities(client: httpx.Client, prompt: Any) -> None:
    choice = ask(client, prompt, echo=True, logprobs=2, max_tokens=3)["choices"][0]
    logprobs = choice["logprobs"]

    assert choice["text"] == "né 🧿né"
    assert len(logprobs["tokens"]) == len("né 🧿né".encode())
    assert logprobs["tokens"][:4] == ["n", "bytes:\\xc3", "bytes:\\xa9", " "]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [0.0] * 10
    assert all(token in top for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True))


def test_completion_of_no_tokens_is_the_prompt(client: httpx.Client) -> None:
    answer = ask(client, "abc", echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]

    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0
    assert ask(client, "abc", max_tokens=0)["choices"][0]["text"] == ""


def test_completion_counts_the_token_that_ends_it(client: httpx.Client) -> None:
    """lm-eval takes the last entry for the one generated token, whatever that is."""
    with serving(max_batch_size=1) as served, httpx.Client(base_url=served.url) as other:
        choice = ask(other, "abc", echo=True, logprobs=1, max_tokens=4)["choices"][0]

    assert choice["finish_reason"] == "stop"
    assert choice["text"] == "abcabc"
    assert choice["logprobs"]["tokens"] == [*"abcabc", ""]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5, 6]


def test_completion_works_with_the_official_client(echo: Served) -> None:
    client = OpenAI(base_url=echo.url + "/v1", api_key="none", max_retries=0)

    answer = client.completions.create(model="echo", prompt=["a", "b"], logprobs=1, echo=True, max_tokens=2)
    chunks = list(client.completions.create(model="echo", prompt="abc", stream=True))

    assert [choice.text for choice in answer.choices] == ["aa", "bb"]
    assert answer.choices[0].logprobs is not None
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abc"
    client.close()
