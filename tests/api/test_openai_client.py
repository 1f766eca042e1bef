"""The official client, as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import support
from support import serving

from serve.engine.base import EngineConfig
from serve.engine.echo import EchoEngine

MESSAGES: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo 👋"}]


@pytest.fixture(scope="module")
def client(echo: support.Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=echo.url + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_openai_client_reads_a_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=100, temperature=0, seed=1)

    assert answer.choices[0].message.content == "héllo 👋"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2 * len("héllo 👋".encode()) + 1


def test_openai_client_reads_a_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="echo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )

    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "héllo 👋"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None


def test_openai_client_folds_a_stream_itself(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="echo", messages=MESSAGES) as stream:
        answer = stream.get_final_completion()

    assert answer.choices[0].message.content == "héllo 👋"
    assert answer.choices[0].finish_reason == "stop"


async def test_openai_client_works_asynchronously(echo: support.Served) -> None:
    async with openai.AsyncOpenAI(base_url=echo.url + "/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
        text = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]

    assert "".join(text) == "héllo 👋"


def test_openai_client_finds_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "trimaran"


def test_openai_client_finds_a_model_with_slashes() -> None:
    """Case 51."""
    with (
        serving(model_name="org/model") as served,
        openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        assert client.models.retrieve("org/model").id == "org/model"


def test_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=0)

    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    assert wrong.value.param == "max_tokens"
    assert wrong.value.type == "invalid_request_error"


def test_openai_client_learns_of_a_wrong_key() -> None:
    with serving(api_keys="sk-right") as served:
        for key, is_right in (("sk-right", True), ("sk-wrong", False)):
            with openai.OpenAI(base_url=served.url + "/v1", api_key=key, max_retries=0) as client:
                if is_right:
                    assert client.models.list().data
                else:
                    with pytest.raises(openai.AuthenticationError) as refused:
                        client.models.list()
                    assert refused.value.code == "invalid_api_key"


def test_openai_client_retries_while_the_queue_is_full() -> None:
    config = EngineConfig(max_batch_size=1, max_queue=0)
    with (
        serving(EchoEngine(config, step_s=0.005)) as served,
        openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as impatient,
    ):
        with impatient.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "x" * 4000}], stream=True
        ):
            support.eventually(lambda: served.stats().num_running == 1)
            with pytest.raises(openai.RateLimitError):
                impatient.chat.completions.create(model="echo", messages=MESSAGES)
        support.eventually(served.is_idle)
        patient = impatient.with_options(max_retries=2)
        assert patient.chat.completions.create(model="echo", messages=MESSAGES).choices[0].message.content == "héllo 👋"


def test_openai_client_raises_an_error_of_a_stream() -> None:
    """Case 15."""
    with (
        serving(support.scripted_engine([*b"ab", None])) as served,
        openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="not finite"):
            list(stream)


def test_openai_client_reads_a_response(client: openai.OpenAI) -> None:
    made = client.responses.create(model="echo", input="héllo 👋", instructions="be brief", temperature=0)

    assert made.output_text == "héllo 👋"
    assert client.responses.retrieve(made.id).output_text == "héllo 👋"
    assert [item.type for item in client.responses.input_items.list(made.id)] == ["message"]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_openai_client_folds_the_stream_of_a_response(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="echo", input="héllo 👋", stream=True))
    with client.responses.stream(model="echo", input="héllo 👋") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        folded = stream.get_final_response()

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(deltas) == folded.output_text == "héllo 👋"


def test_openai_client_goes_on_from_a_response(client: openai.OpenAI) -> None:
    first = client.responses.create(model="echo", input="a")
    second = client.responses.create(model="echo", input="b", previous_response_id=first.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="echo", input="b", previous_response_id="resp_nothing")

    assert second.previous_response_id == first.id
    assert refused.value.code == "previous_response_not_found"


async def test_openai_client_reads_responses_asynchronously(echo: support.Served) -> None:
    async with openai.AsyncOpenAI(base_url=echo.url + "/v1", api_key="none", max_retries=0) as client:
        made = await client.responses.create(model="echo", input="héllo 👋", background=True)
        while made.status == "in_progress":
            made = await client.responses.retrieve(made.id)
        cancelled = await client.responses.cancel(made.id)

    assert (made.status, made.output_text, cancelled.status) == ("completed", "héllo 👋", "completed")


def test_openai_client_raises_an_error_of_a_response() -> None:
    with (
        serving(support.scripted_engine([*b"ab", None])) as served,
        openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        seen: list[str] = []
        stream = client.responses.create(model="echo", input="a", stream=True)
        with pytest.raises(openai.APIError, match="not finite"):
            seen.extend(event.type for event in stream)
        assert seen[-1] == "response.failed"
