"""Structured output end to end: with real weights, and with random ones, which are the best adversary.

Every finished answer parses and validates; what is unfinished ended by max_tokens.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from support import Served, json_schema, serving, sse_chunks
from tiny import tiny_llama

PATH = "/v1/chat/completions"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}},
                                          "additionalProperties": False}}},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "object", "properties": {"d": {"type": "string", "format": "date"}}, "required": ["d"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def real(demo_model: Path) -> Iterator[Served]:
    with serving(engine="transformers", model=str(demo_model), dtype="float32", max_batch_size=4) as served:
        yield served


@pytest.fixture(scope="module")
def wild(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Random weights behind the real tokenizer."""
    folder = tiny_llama(tmp_path_factory.mktemp("wild") / "wild", vocab_size=49152, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model / name, folder / name)
    with serving(
        engine="transformers", model=str(folder), model_name="wild", dtype="float32", max_batch_size=8
    ) as served:
        yield served


def body(served: Served, text: str = "Invent somebody.", **fields: Any) -> dict[str, Any]:
    name = served.app.state.settings.served_name
    return {"model": name, "messages": [{"role": "user", "content": text}], **fields}


def ask(served: Served, **fields: Any) -> dict[str, Any]:
    response = httpx.post(served.url + PATH, json=body(served, **fields), timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def check(choice: dict[str, Any], schema: dict[str, Any]) -> bool:
    """Whether the answer is finished; then it must validate."""
    if choice["finish_reason"] == "length":
        return False
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), schema, format_checker=jsonschema.FormatChecker())
    return True


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_real_model_keeps_to_a_schema(real: Served, schema: dict[str, Any]) -> None:
    choice = ask(real, response_format=json_schema(schema, strict=True), temperature=0, max_tokens=40)
    assert check(choice, schema) or schema in SCHEMAS[2:4]  # some go on for ever: digits, levels


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_random_model_keeps_to_a_schema(wild: Served, schema: dict[str, Any]) -> None:
    answer = httpx.post(
        wild.url + PATH,
        json=body(wild, response_format=json_schema(schema), n=8, temperature=1.5, seed=1, max_tokens=300),
        timeout=60,
    ).json()
    assert sum(check(choice, schema) for choice in answer["choices"]) >= 4


@pytest.mark.parametrize("make", ["guided_json", "structured_outputs", "string"])
def test_schemas_in_the_form_of_other_servers(real: Served, make: str) -> None:
    fields = {
        "guided_json": {"guided_json": PERSON},
        "structured_outputs": {"structured_outputs": {"json": PERSON}},
        "string": {"guided_json": json.dumps(PERSON)},
    }[make]
    assert check(ask(real, temperature=0, max_tokens=120, **fields), PERSON)


def test_other_kinds_of_constraint(real: Served) -> None:
    assert ask(real, guided_choice=["red", "blue"])["message"]["content"] in {"red", "blue"}
    assert re.fullmatch(r"\d{3}-[a-f]{2}", ask(real, guided_regex=r"\d{3}-[a-f]{2}")["message"]["content"])
    said = ask(real, guided_grammar='start: "a" start "b" | "c"', max_tokens=30)
    assert said["finish_reason"] == "length" or re.fullmatch("a*cb*", said["message"]["content"])
    assert ask(real, structured_outputs={"choice": ["x"]})["message"]["content"] == "x"
    said = ask(real, response_format={"type": "json_object"}, max_tokens=60, temperature=0)
    assert said["message"]["content"].startswith("{")
    assert "  " not in re.sub(r'"(\\.|[^"\\])*("|$)', "", said["message"]["content"])


def test_plain_and_streamed_are_the_same_with_seed_stop_and_penalties(wild: Served) -> None:
    fields = {"response_format": json_schema(PERSON), "seed": 5, "temperature": 1.2, "max_tokens": 200}
    for more in ({}, {"stop": ["a"]}, {"frequency_penalty": 1.0}, {"max_tokens": 7}):
        try:
            plain = ask(wild, **{**fields, **more})
        except AssertionError as error:
            assert "unsupported_parameter" in str(error)  # noqa: PT017 - penalties come with another change
            continue
        chunks = sse_chunks(
            httpx.post(wild.url + PATH, json=body(wild, **{**fields, **more}, stream=True), timeout=60).text
        )
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert text == plain["message"]["content"]
        assert chunks[-1]["choices"][0]["finish_reason"] == plain["finish_reason"]


def test_constrained_requests_do_not_change_their_neighbours(real: Served) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{real.url}/v1", api_key="x", max_retries=0) as client:

            async def one(**fields: Any) -> str:
                answer = await client.chat.completions.create(
                    **body(real, "Name three colours."), temperature=0, max_tokens=24, **fields
                )
                return answer.choices[0].message.content or ""

            alone = await one()
            free, _, again, constrained = await asyncio.gather(
                one(),
                one(response_format={"type": "json_object"}),
                one(),
                one(extra_body={"guided_regex": "[0-9]{4}"}),
            )
            assert free == again == alone
            assert re.fullmatch("[0-9]{4}", constrained)

    asyncio.run(run())


class Person(BaseModel):
    name: str
    age: int


def test_openai_client_parses_its_own_models(real: Served) -> None:
    with OpenAI(base_url=f"{real.url}/v1", api_key="x", max_retries=0) as client:
        asked: Any = body(real, "Give me a person.")
        parsed = client.chat.completions.parse(**asked, response_format=Person, temperature=0, max_tokens=100)
        assert isinstance(parsed.choices[0].message.parsed, Person)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}, "unit": {"$ref": "#/$defs/u"}},
                "required": ["city", "unit"],
                "additionalProperties": False,
                "$defs": {"u": {"enum": ["c", "f"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]


@pytest.fixture(scope="module")
def calling(demo_model: Path, wild: Served) -> Iterator[Served]:
    """The same random model, with the generic prompt for tools."""
    model = wild.app.state.settings.model
    with serving(
        engine="transformers", model=model, model_name="wild", dtype="float32", max_batch_size=8, tool_prompt="generic"
    ) as served:
        yield served


def test_demanded_calls_are_calls_whatever_the_model(calling: Served) -> None:
    for choice, names in (
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_time"}}],
                },
            },
            {"get_time"},
        ),
    ):
        answer = httpx.post(
            calling.url + PATH,
            json=body(calling, tools=TOOLS, tool_choice=choice, n=8, temperature=1.5, max_tokens=400, seed=3),
            timeout=60,
        ).json()
        for said in answer["choices"]:
            assert said["finish_reason"] == "tool_calls"
            assert said["message"]["content"] is None
            for call in said["message"]["tool_calls"]:
                assert call["function"]["name"] in names
                schema = (
                    TOOLS[0]["function"]["parameters"] if call["function"]["name"] == "get_weather" else {"const": {}}
                )
                jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
            if isinstance(choice, dict) and choice["type"] == "function":
                assert len(said["message"]["tool_calls"]) == 1


def test_demanded_calls_stream_and_may_be_cut(calling: Served) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    for max_tokens in (200, 12):
        plain = ask(calling, **fields, max_tokens=max_tokens)
        streamed = httpx.post(
            calling.url + PATH, json=body(calling, **fields, max_tokens=max_tokens, stream=True), timeout=60
        ).text
        deltas = [
            call["function"]
            for chunk in sse_chunks(streamed)
            for call in chunk["choices"][0]["delta"].get("tool_calls", ())
        ]
        calls = plain["message"].get("tool_calls", [])
        assert "".join(delta["arguments"] for delta in deltas) == "".join(
            call["function"]["arguments"] for call in calls
        )
        assert [delta["name"] for delta in deltas if "name" in delta] == [call["function"]["name"] for call in calls]
        assert plain["finish_reason"] == ("length" if max_tokens == 12 else "tool_calls")


def test_text_or_call_where_the_text_is_constrained(calling: Served) -> None:
    answer = httpx.post(
        calling.url + PATH,
        json=body(
            calling, tools=TOOLS, response_format=json_schema(SCHEMAS[1]), n=8, temperature=1.5, max_tokens=300, seed=0
        ),
        timeout=60,
    ).json()
    for choice in answer["choices"]:
        if calls := choice["message"].get("tool_calls"):
            assert choice["finish_reason"] == "tool_calls"
            assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
        else:
            check(choice, SCHEMAS[1])


def test_hostile_schemas_cost_nobody_else_anything(real: Served) -> None:
    """They are compiled off the event loop: /health answers all the while."""

    async def run() -> float:
        schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(1500)}}
        async with httpx.AsyncClient(base_url=real.url, timeout=60) as client:
            formats = [json_schema({**schema, "title": str(number)}) for number in range(3)]
            hostile = [
                asyncio.create_task(client.post(PATH, json=body(real, response_format=wanted, max_tokens=1)))
                for wanted in formats
            ]
            slowest = 0.0
            while not all(task.done() for task in hostile):
                began = time.perf_counter()
                assert (await client.get("/health")).status_code == 200
                slowest = max(slowest, time.perf_counter() - began)
                await asyncio.sleep(0.01)
            assert {task.result().status_code for task in hostile} <= {200, 400}
            return slowest

    assert asyncio.run(run()) < 1.0  # a blocked loop would be silent for seconds


def test_echo_keeps_to_a_schema_too() -> None:
    with serving() as served:
        assert check(ask(served, response_format=json_schema(PERSON)), PERSON)
        endless = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
        assert check(ask(served, response_format=json_schema(endless)), endless)
        assert ask(served, guided_choice=["Invent"])["message"]["content"] == "Invent"
