"""Images in messages to a model that reads text only: refused by name, or a note in their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import support

from serve.api.fields import IMAGE_NOTE

PICTURE = "data:image/png;base64,AAAA"
TEXT = {"type": "text", "text": "Look:"}
CHAT = [TEXT, {"type": "image_url", "image_url": {"url": PICTURE}}]
RESULT = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]
REQUESTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": CHAT}]}, "messages[0].content[1]"),
    "tokenize": ("/tokenize", {"messages": [{"role": "user", "content": CHAT}]}, "messages[0].content[1]"),
    "response": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PICTURE}]}]},
        "input[0].content[0]",
    ),
    "output of a call": (
        "/v1/responses",
        {
            "input": [
                {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_image"}]},
            ]
        },
        "input[1].output[0]",
    ),
    "message": (
        "/v1/messages",
        {"max_tokens": 900, "messages": [{"role": "user", "content": [TEXT, *RESULT]}]},
        "messages[0].content[1]",
    ),
    "result of a tool": (
        "/v1/messages",
        {
            "max_tokens": 900,
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": RESULT}]},
            ],
        },
        "messages[1].content[0].content[0]",
    ),
}


@pytest.fixture(scope="module")
def noting() -> Iterator[httpx.Client]:
    with (
        support.serving(image_input="note", strict=True) as served,
        httpx.Client(base_url=served.url, trust_env=False, timeout=20) as client,
    ):
        yield client


@pytest.mark.parametrize("name", REQUESTS)
def test_image_becomes_a_note_where_the_operator_says_so(noting: httpx.Client, name: str) -> None:
    path, fields, place = REQUESTS[name]
    response = noting.post(path, json={"model": "echo", **fields})

    assert response.status_code == 200, response.text
    assert response.headers["x-ignored-parameters"] == place
    if path == "/tokenize":
        text = noting.post("/detokenize", json={"tokens": response.json()["tokens"]}).json()["prompt"]
    else:
        text = response.text  # the echo engine repeats its prompt
    assert IMAGE_NOTE in text
    assert "AAAA" not in text


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("strict", [False, True])
def test_image_is_refused_by_its_place(strict: bool, name: str, request: pytest.FixtureRequest) -> None:
    path, fields, place = REQUESTS[name]
    client: httpx.Client = request.getfixturevalue("strict_client" if strict else "client")
    response = client.post(path, json={"model": "echo", **fields})

    assert response.status_code == 400
    assert place in response.json()["error"]["message"]
    assert "text only" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def strict_client() -> Iterator[httpx.Client]:
    with (
        support.serving(strict=True) as served,
        httpx.Client(base_url=served.url, trust_env=False, timeout=20) as client,
    ):
        yield client


def test_sound_is_refused_even_so(noting: httpx.Client) -> None:
    messages = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]
    response = noting.post("/v1/chat/completions", json={"model": "echo", "messages": messages})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[0]"
