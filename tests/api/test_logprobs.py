"""Log-probabilities of chat completions: exact bytes, and a stream that folds to the answer."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import chat, openai_error, sse_chunks

COMPLETIONS = "/v1/chat/completions"
TEXTS = st.text(
    st.one_of(st.sampled_from("ab, \n"), st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")),
    min_size=1,
    max_size=30,
)


def ask(client: httpx.Client, text: str, **fields: Any) -> dict[str, Any]:
    response = client.post(COMPLETIONS, json=chat(text, **fields))
    assert response.status_code == 200, response.text
    return response.json()


@settings(max_examples=25, deadline=None)
@given(
    text=TEXTS,
    num_top=st.none() | st.integers(0, 20),
    max_tokens=st.integers(1, 60),
    stop=st.none() | st.text("ab", min_size=1, max_size=2),
)
@example(text="🧿🧿", num_top=3, max_tokens=6, stop=None)
@example(text="xab🧿", num_top=1, max_tokens=60, stop="b🧿")
def test_logprobs_spell_the_content(
    client: httpx.Client, text: str, num_top: int | None, max_tokens: int, stop: str | None
) -> None:
    """Case 33 and the shape: the bytes of the entries are the text, streamed or not."""
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": num_top, "max_tokens": max_tokens, "stop": stop}
    whole = ask(client, text, **fields)["choices"][0]
    streamed = client.post(COMPLETIONS, json=chat(text, stream=True, **fields))
    chunks = sse_chunks(streamed.content.decode())

    entries = whole["logprobs"]["content"]
    assert whole["logprobs"]["refusal"] is None
    spelt = bytes(byte for entry in entries for byte in entry["bytes"])
    assert spelt.decode(errors="ignore") == whole["message"]["content"]
    for entry in entries:
        assert set(entry) == {"token", "bytes", "logprob", "top_logprobs"}
        assert entry["token"] == bytes(entry["bytes"]).decode(errors="replace")
        assert len(entry["top_logprobs"]) == (num_top or 0)
        assert all(set(top) == {"token", "bytes", "logprob"} for top in entry["top_logprobs"])
        assert all(top["logprob"] >= -9999.0 for top in entry["top_logprobs"])
    pieces = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == entries


def test_logprobs_are_null_unless_asked_for(client: httpx.Client) -> None:
    assert ask(client, "a", logprobs=False)["choices"][0]["logprobs"] is None
    assert ask(client, "a", logprobs=None, top_logprobs=None)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 0, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"logit_bias": {"99999999": 5}}, "logit_bias"),  # case 31
        ({"logit_bias": {"xx": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"9": 200}}, "logit_bias.9"),
        ({"logit_bias": {"9": "it's"}}, "logit_bias.9"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_sampling_fields_out_of_range_are_refused_before_the_headers(
    client: httpx.Client, fields: dict[str, Any], param: str, stream: bool
) -> None:
    response = client.post(COMPLETIONS, json=chat("a", stream=stream, **fields))

    assert response.status_code == 400
    assert openai_error(response.json())["param"] == param


def test_sampling_fields_of_other_servers_are_taken(client: httpx.Client) -> None:
    fields = {
        "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": False, "stop_token_ids": [255], "top_k": -1,
        "min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"9": -100}, "seed": -1,
    }  # fmt: skip
    response = client.post(COMPLETIONS, json=chat("a", **fields))

    assert response.status_code == 200
    assert "x-ignored-parameters" not in response.headers
