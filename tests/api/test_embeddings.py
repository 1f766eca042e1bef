"""``/v1/embeddings`` with the real MiniLM beside the echo engine."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI
from support import Served, chat, eventually, openai_error, serving

NAME = "all-MiniLM-L6-v2"
PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def served(demo_embedding: Path) -> Iterator[Served]:
    with serving(embedding_model=str(demo_embedding)) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def ask(client: httpx.Client, given: Any, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"model": NAME, "input": given, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def near(first: list[float], second: list[float]) -> bool:
    return math.dist(first, second) < 1e-4


def test_embeddings_of_every_kind_of_input(client: httpx.Client) -> None:
    one = ask(client, "A boat.")
    many = ask(client, ["A boat.", "A much longer text about something else entirely.", "A boat."])
    ids = [101, 1037, 4049, 1012, 102]
    as_ids, as_lists = ask(client, ids), ask(client, [ids, ids[:3]])

    assert one["object"] == "list"
    assert one["model"] == NAME
    assert one["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    vector = one["data"][0]["embedding"]
    assert len(vector) == 384
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)
    assert [(item["object"], item["index"]) for item in many["data"]] == [("embedding", at) for at in range(3)]
    for other in (many["data"][0], many["data"][2], as_ids["data"][0], as_lists["data"][0]):
        assert near(other["embedding"], vector)
    assert not near(many["data"][1]["embedding"], vector)
    assert as_lists["usage"]["prompt_tokens"] == 8


def test_embeddings_in_base64_are_the_same_numbers(client: httpx.Client) -> None:
    plain = ask(client, ["a", "b"])
    packed = ask(client, ["a", "b"], encoding_format="base64")

    for one, other in zip(plain["data"], packed["data"], strict=True):
        assert near(list(struct.unpack("<384f", base64.b64decode(other["embedding"]))), one["embedding"])


def test_embeddings_with_the_official_client(served: Served) -> None:
    client = OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)

    answer = client.embeddings.create(model=NAME, input=["The cat sits.", "A cat is sitting.", "Interest rates rose."])
    cat, kitten, money = (item.embedding for item in answer.data)

    assert sum(a * b for a, b in zip(cat, kitten, strict=True)) > 0.7
    assert sum(a * b for a, b in zip(cat, money, strict=True)) < 0.3
    assert [model.id for model in client.models.list()] == ["echo", NAME]
    assert client.models.retrieve(NAME).id == NAME
    client.close()


def test_embeddings_of_many_requests_at_once_keep_their_order(client: httpx.Client) -> None:
    texts = [f"number {at}" for at in range(24)]
    alone = [ask(client, text)["data"][0]["embedding"] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda at: ask(client, [texts[at], texts[-at - 1]]), range(24)))

    for at, answer in enumerate(together):
        assert near(answer["data"][0]["embedding"], alone[at])
        assert near(answer["data"][1]["embedding"], alone[-at - 1])


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input[1]"),
        ({"input": [[]]}, 400, "input[0]"),
        ({"input": None}, 400, "input"),
        ({"input": 5}, 400, "input"),
        ({"input": ["a", 5]}, 400, "input[1]"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"input": "word " * 300}, 400, "input"),
        ({"input": ["a", "word " * 300]}, 400, "input[1]"),
        ({"input": [30522]}, 400, "input"),
        ({"input": [[101], [-1]]}, 400, "input[1]"),
        ({"dimensions": 128}, 400, "dimensions"),
        ({"dimensions": 0}, 400, "dimensions"),
        ({"encoding_format": "int8"}, 400, "encoding_format"),
        ({"model": "echo"}, 404, "model"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_embeddings_refuse_by_name(client: httpx.Client, fields: dict[str, Any], status: int, param: str) -> None:
    response = client.post(PATH, json={"model": NAME, "input": "a", **fields})

    assert response.status_code == status, response.text
    assert openai_error(response.json())["param"] == param
    if "word" in str(fields):
        assert "256" in response.text


def test_embeddings_take_the_models_own_size(client: httpx.Client) -> None:
    assert len(ask(client, "a", dimensions=384)["data"][0]["embedding"]) == 384


def test_embeddings_name_does_not_chat(client: httpx.Client) -> None:
    assert client.post("/v1/chat/completions", json=chat("a", model=NAME)).status_code == 404


def test_embeddings_without_a_model_say_how_to_get_one(echo: Served) -> None:
    response = httpx.post(echo.url + PATH, json={"model": "echo", "input": "a"})

    assert response.status_code == 404
    error = openai_error(response.json())
    assert error["code"] == "model_not_found"
    assert "SERVE_EMBEDDING_MODEL" in error["message"]


def test_embeddings_of_a_model_that_is_not_there_end_the_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with serving(embedding_model=str(tmp_path), wait=False) as served:
        eventually(lambda: served.lifecycle.failure is not None, 30)
        response = httpx.post(served.url + PATH, json={"model": tmp_path.name, "input": "a"})

        assert response.status_code == 503
        assert str(tmp_path.name) in openai_error(response.json())["message"]
