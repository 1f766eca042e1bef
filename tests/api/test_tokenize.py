"""Text to tokens and back."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import openai_error

MESSAGES = [{"role": "user", "content": "a"}]


@settings(max_examples=20, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_tokenize_and_back(client: httpx.Client, text: str) -> None:
    tokens = client.post("/tokenize", json={"model": "echo", "prompt": text}).json()
    back = client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()

    assert tokens == {
        "count": len(text.encode()),
        "max_model_len": 8192,
        "tokens": [*text.encode()],
        "token_strs": None,
    }
    assert back == {"prompt": text}


def test_tokenize_counts_what_a_chat_completion_counts(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "é"}, {"type": "text", "text": "b"}]}]
    count = client.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    answer = client.post("/v1/chat/completions", json={"model": "echo", "messages": messages}).json()

    assert count["count"] == answer["usage"]["prompt_tokens"] == 4
    assert count["token_strs"] == ["bytes:\\xc3", "bytes:\\xa9", "\n", "b"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": ""}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [257]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [65, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [], "model": "other"}, 404, "model"),
    ],
)  # fmt: skip
def test_tokenize_refuses_by_name(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = client.post(path, json=body)

    assert response.status_code == status
    assert openai_error(response.json())["param"] == param
