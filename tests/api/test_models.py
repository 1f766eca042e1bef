"""What is served here, and under which names."""

from __future__ import annotations

import httpx2 as httpx
import pytest
from support import chat, loading, openai_error, serving

from serve.engine.base import EngineConfig
from serve.engine.echo import EchoRunner
from serve.engine.worker import StepEngine


def test_models_list_has_the_one_model(client: httpx.Client) -> None:
    body = client.get("/v1/models").json()

    assert body["object"] == "list"
    (model,) = body["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("echo", "model", "trimaran")
    assert isinstance(model["created"], int)
    assert model["max_model_len"] == 8192
    assert model["batching"] == {"enabled": True, "reason": None}


def test_models_and_version_say_why_requests_are_not_batched() -> None:
    runner = EchoRunner(EngineConfig())
    runner.alone_reason = "it is recurrent"
    engine = StepEngine(EngineConfig(), runner)
    with serving(engine) as served, httpx.Client(base_url=served.url) as client:
        told = {"enabled": False, "reason": "it is recurrent"}
        assert client.get("/v1/models/echo").json()["batching"] == told
        assert client.get("/version").json()["batching"] == told


def test_batching_is_unknown_while_loading() -> None:
    with loading() as (served, _), httpx.Client(base_url=served.url) as client:
        assert client.get("/v1/models").json()["data"][0]["batching"] is None


@pytest.mark.parametrize("name", ["org/model", "a/b/c", "model:7b-q4", "it's 1"])
def test_models_are_found_by_names_with_slashes(name: str) -> None:
    """Case 51."""
    with serving(model_name=name) as served, httpx.Client(base_url=served.url) as client:
        assert client.get(f"/v1/models/{name}").json()["id"] == name
        assert client.get("/v1/models/" + name.replace("/", "%2F")).json()["id"] == name
        answer = client.post("/v1/chat/completions", json=chat("a") | {"model": name})
        assert answer.json()["model"] == name


@pytest.mark.parametrize("name", ["gpt-4o", "Echo", "echo/x", " echo", "e" * 1_000_000])
@pytest.mark.parametrize("stream", [False, True])
def test_models_unknown_in_a_request_are_404_with_the_right_name(client: httpx.Client, name: str, stream: bool) -> None:
    """Case 51."""
    response = client.post("/v1/chat/completions", json=chat("a", stream=stream) | {"model": name})

    error = openai_error(response.json())
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'echo'" in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize("path", ["gpt-4o", "a/b/c", "echo/", "%00"])
def test_models_unknown_in_a_path_are_404(client: httpx.Client, path: str) -> None:
    response = client.get(f"/v1/models/{path}")

    assert response.status_code == 404
    assert openai_error(response.json())["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/echo", "/health", "/ready", "/", "/docs", "/openapi.json"])
def test_models_and_health_answer_head_without_a_body(client: httpx.Client, path: str) -> None:
    """Case 48."""
    response, whole = client.head(path), client.get(path)

    assert response.status_code == 200
    assert response.content == b""
    assert response.headers["content-type"] == whole.headers["content-type"]


def test_models_are_listed_while_loading() -> None:
    with loading() as (served, _):
        assert httpx.get(served.url + "/v1/models").json()["data"][0]["id"] == "echo"
