"""Anthropic's client, as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
import support
from support import serving

MESSAGES: list[Any] = [{"role": "user", "content": "héllo 👋"}]


@pytest.fixture(scope="module")
def client(echo: support.Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=echo.url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_anthropic_client_reads_a_whole_answer(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="echo", max_tokens=100, messages=MESSAGES, system="be brief")

    assert [block.text for block in answer.content if block.type == "text"] == ["héllo 👋"]
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens == len("héllo 👋".encode()) + 1


def test_anthropic_client_reads_a_stream(client: anthropic.Anthropic) -> None:
    events = list(client.messages.create(model="echo", max_tokens=100, messages=MESSAGES, stream=True))

    assert events[0].type == "message_start"
    assert events[-1].type == "message_stop"


def test_anthropic_client_folds_a_stream_to_the_answer(client: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"model": "echo", "max_tokens": 100, "messages": MESSAGES, "stop_sequences": ["👋"]}
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        folded = stream.get_final_message()

    assert text == "héllo "
    assert folded.to_dict() | {"id": ""} == whole.to_dict() | {"id": ""}
    assert (folded.stop_reason, folded.stop_sequence) == ("stop_sequence", "👋")


async def test_anthropic_client_works_asynchronously(echo: support.Served) -> None:
    async with anthropic.AsyncAnthropic(base_url=echo.url, api_key="none", max_retries=0) as client:
        async with client.messages.stream(model="echo", max_tokens=100, messages=MESSAGES) as stream:
            text = [piece async for piece in stream.text_stream]
        answer = await client.messages.create(model="echo", max_tokens=3, messages=MESSAGES)

    assert "".join(text) == "héllo 👋"
    assert answer.stop_reason == "max_tokens"


def test_anthropic_client_counts_tokens(client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model="echo", messages=MESSAGES)

    assert count.input_tokens == len("héllo 👋".encode())


def as_any(keys: Any) -> Any:
    return keys


def test_anthropic_client_sends_its_key_either_way() -> None:
    with serving(api_keys="sk-right") as served:
        for keys in ({"api_key": "sk-right"}, {"auth_token": "sk-right"}):  # x-api-key, and Bearer
            with anthropic.Anthropic(base_url=served.url, max_retries=0, **as_any(keys)) as client:
                assert client.messages.create(model="echo", max_tokens=9, messages=MESSAGES).content
        with (
            anthropic.Anthropic(base_url=served.url, max_retries=0, api_key="sk-wrong") as client,
            pytest.raises(anthropic.AuthenticationError) as refused,
        ):
            client.messages.create(model="echo", max_tokens=9, messages=MESSAGES)
    assert refused.value.request_id


def test_anthropic_client_raises_its_own_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.messages.create(model="claude", max_tokens=9, messages=MESSAGES)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="echo", max_tokens=0, messages=MESSAGES)


def test_anthropic_client_raises_an_error_of_a_stream() -> None:
    with (
        serving(support.scripted_engine([*b"ab", None])) as served,
        anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client,
    ):
        stream = client.messages.create(model="echo", max_tokens=9, messages=MESSAGES, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="not finite"):
            list(stream)
