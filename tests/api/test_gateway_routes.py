"""Every route of the model's server through a gateway, against the same server asked directly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2 as httpx
import openai
import pytest
import support
from gateways import gateway, response, scripted
from support import Served, chat, eventually, message_error, named_events, openai_error
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from serve.api import remote as routes
from serve.engine.echo import EchoEngine
from serve.keys import ApiKey, digest_of, write_keys

REMOTE_KEY, KEYS = "remote-key", ("own-key", "second-key")
RESPONSES = "/v1/responses"


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Served, Served]]:
    """A remote with a key, and its gateway with two others."""
    with (
        support.serving(EchoEngine(step_s=0.005), api_keys=REMOTE_KEY) as remote,
        gateway(remote.url, remote_api_key=REMOTE_KEY, api_keys=",".join(KEYS)) as (served, _),
    ):
        yield remote, served


@pytest.fixture(scope="module")
def client(pair: tuple[Served, Served]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pair[1].url, headers={"authorization": f"Bearer {KEYS[0]}"}, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def direct(pair: tuple[Served, Served]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pair[0].url, headers={"authorization": f"Bearer {REMOTE_KEY}"}, timeout=30) as client:
        yield client


def without_names(answer: Any) -> Any:
    """An answer without what differs from one request to the next: ids and times."""
    text = json.dumps(answer)
    text = re.sub(r'"(\w+_[0-9a-f]{32}|chatcmpl-\w+|cmpl-\w+)"', '"id"', text)
    return json.loads(re.sub(r'"(created\w*|completed_at)": [\d.]+', r'"\1": 0', text))


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat("hello"),
    "/v1/completions": {"model": "echo", "prompt": "hello"},
    RESPONSES: {"model": "echo", "input": "hello"},
    f"{RESPONSES}/input_tokens": {"model": "echo", "input": "hello"},
    f"{RESPONSES}/compact": {"model": "echo", "input": "hello"},
    "/v1/messages": chat("hello", max_tokens=9),
    "/v1/messages/count_tokens": chat("hello"),
    "/v1/embeddings": {"model": "echo", "input": "hello"},
    "/tokenize": {"prompt": "hello", "return_token_strs": True},
    "/detokenize": {"tokens": [104, 105]},
}


def test_every_passed_path_is_tried_here() -> None:
    assert set(BODIES) == set(routes.POST_PATHS)


@pytest.mark.parametrize("path", BODIES)
def test_route_answers_through_the_gateway_as_it_does_directly(
    client: httpx.Client, direct: httpx.Client, path: str
) -> None:
    """Refusals too: this server has no embeddings, and compacts nothing."""
    expected, passed = direct.post(path, json=BODIES[path]), client.post(path, json=BODIES[path])
    assert passed.status_code == expected.status_code
    assert without_names(passed.json()) == without_names(expected.json())


@pytest.mark.parametrize("path", BODIES)
def test_route_refuses_a_wrong_body_in_its_own_words(client: httpx.Client, direct: httpx.Client, path: str) -> None:
    wrong = dict.fromkeys(BODIES[path], 1)
    expected, passed = direct.post(path, json=wrong), client.post(path, json=wrong)
    assert passed.status_code == expected.status_code >= 400
    if path.startswith("/v1/messages"):
        assert message_error(passed) == message_error(expected)
    else:
        assert openai_error(passed.json()) == openai_error(expected.json())


@pytest.mark.parametrize("path", ["/v1/completions", RESPONSES, "/v1/messages"])
def test_streams_of_each_wire_pass_unchanged(client: httpx.Client, direct: httpx.Client, path: str) -> None:
    body = {**BODIES[path], "stream": True}
    streams = [asked.post(path, json=body).text for asked in (client, direct)]
    named = [re.sub(r"\w+_[0-9a-f]{32}|cmpl-\w+", "id", stream) for stream in streams]
    passed, expected = (re.sub(r'"(created\w*|completed_at)":[\d.]+', r'"\1":0', stream) for stream in named)
    assert passed == expected


def test_stored_response_lives_at_the_remote(client: httpx.Client) -> None:
    first = client.post(RESPONSES, json={"model": "echo", "input": "one"}).json()
    second = client.post(
        RESPONSES, json={"model": "echo", "input": "two", "previous_response_id": first["id"], "stream": True}
    )
    second_id = named_events(second.text)[-1]["response"]["id"]
    found = client.get(f"{RESPONSES}/{second_id}").json()
    assert (found["id"], found["previous_response_id"]) == (second_id, first["id"])
    items = client.get(f"{RESPONSES}/{first['id']}/input_items", params={"limit": 1, "order": "asc"}).json()
    assert [item["content"][0]["text"] for item in items["data"]] == ["one"]
    assert client.get(f"{RESPONSES}/{first['id']}/input_items", params={"limit": 0}).status_code == 400
    assert client.delete(f"{RESPONSES}/{first['id']}").json() == {
        "id": first["id"],
        "object": "response",
        "deleted": True,
    }
    assert client.get(f"{RESPONSES}/{first['id']}").status_code == 404


def test_background_response_is_polled_and_cancelled(pair: tuple[Served, Served]) -> None:
    remote, served = pair
    with openai.OpenAI(base_url=served.url + "/v1", api_key=KEYS[0]) as client:
        begun = client.responses.create(model="echo", input="x" * 3000, background=True)
        assert client.responses.retrieve(begun.id).status in {"queued", "in_progress"}
        assert client.responses.cancel(begun.id).status == "cancelled"
    eventually(remote.is_idle)


def test_callers_of_a_gateway_do_not_see_each_others_responses(client: httpx.Client) -> None:
    ids = [client.post(RESPONSES, json={"model": "echo", "input": "mine"}).json()["id"]]
    streamed = client.post(RESPONSES, json={"model": "echo", "input": "mine", "stream": True}).text
    ids.append(named_events(streamed)[-1]["response"]["id"])
    other = {"x-api-key": KEYS[1]}
    for mine in ids:
        for method, below in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            refused = client.request(method, f"{RESPONSES}/{mine}{below}", headers=other)
            assert refused.status_code == 404, (method, below)
        goes_on = {"model": "echo", "input": "yours", "previous_response_id": mine}
        refused = client.post(RESPONSES, json=goes_on, headers=other)
        assert openai_error(refused.json())["code"] == "previous_response_not_found"
        counted = client.post(f"{RESPONSES}/input_tokens", json=goes_on, headers=other)
        assert counted.status_code == 400
        assert client.get(f"{RESPONSES}/{mine}").status_code == 200


def test_callers_of_a_gateway_are_kept_apart_wherever_their_keys_are(
    pair: tuple[Served, Served], tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    write_keys(file, [ApiKey(digest=digest_of(key.encode())) for key in KEYS])
    with gateway(pair[0].url, remote_api_key=REMOTE_KEY, api_keys_file=file) as (_, client):
        mine, other = ({"x-api-key": key} for key in KEYS)
        made = client.post(RESPONSES, json={"model": "echo", "input": "mine"}, headers=mine).json()["id"]
        assert client.get(f"{RESPONSES}/{made}", headers=mine).status_code == 200
        assert client.get(f"{RESPONSES}/{made}", headers=other).status_code == 404


def test_gateway_with_one_key_passes_every_id(pair: tuple[Served, Served], direct: httpx.Client) -> None:
    made = direct.post(RESPONSES, json={"model": "echo", "input": "before the gateway"}).json()["id"]
    with gateway(pair[0].url, remote_api_key=REMOTE_KEY) as (_, client):
        assert client.get(f"{RESPONSES}/{made}").json()["id"] == made
        for strange in ("..", "%2e%2e", "a%2Fb", "a%20b", "x" * 200):
            assert client.get(f"{RESPONSES}/{strange}").status_code == 404


def test_anthropics_client_works_through_a_gateway(pair: tuple[Served, Served]) -> None:
    with anthropic.Anthropic(base_url=pair[1].url, api_key=KEYS[0], max_retries=0) as client:
        asked: Any = {"model": "echo", "messages": [{"role": "user", "content": "claudish"}]}
        assert client.messages.create(**asked, max_tokens=50).content[0].to_dict()["text"] == "claudish"
        assert client.messages.count_tokens(**asked).input_tokens > 0
        with client.messages.stream(**asked, max_tokens=50) as stream:
            assert stream.get_final_text() == "claudish"
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**asked, "model": "other"}, max_tokens=50)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/audio/speech"),
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/moderations"),
        ("GET", "/v1/files"),
        ("POST", "/v1/batches"),
        ("POST", "/v1/conversations"),
        ("POST", "/v1/messages/batches"),
        ("POST", "/v1/complete"),
    ],
)
def test_routes_that_are_not_passed_are_refused_by_name(client: httpx.Client, method: str, path: str) -> None:
    refused = client.request(method, path, json={} if method == "POST" else None)
    assert refused.status_code == 404
    error = message_error(refused) if path.startswith("/v1/messages") else openai_error(refused.json())
    assert path in error["message"]


def test_websocket_is_refused_with_the_alternative(pair: tuple[Served, Served]) -> None:
    url = pair[1].url.replace("http", "ws") + "/v1/realtime/chat"
    with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers={"x-api-key": KEYS[0]}):
        pass
    answer = refused.value.response
    assert answer.status_code == 404
    error = openai_error(json.loads(answer.body))
    assert error["code"] == "route_not_offered"
    assert "/v1/chat/completions" in error["message"]


@pytest.mark.parametrize(
    "answer",
    [
        response("404 Not Found", b'{"detail":"Not Found"}'),
        response("405 Method Not Allowed", b'{"detail":"Method Not Allowed"}'),
    ],
)
def test_route_that_the_remote_lacks_is_named(answer: bytes) -> None:
    with scripted(answer) as url, gateway(url) as (_, client):
        refused = openai_error(client.post("/v1/embeddings", json=BODIES["/v1/embeddings"]).json())
        assert refused["code"] == "route_not_offered"
        assert "/v1/embeddings" in refused["message"]
        refused = client.post("/v1/messages", json=BODIES["/v1/messages"])
        assert (refused.status_code, message_error(refused)["type"]) == (404, "not_found_error")


def test_openais_error_becomes_anthropics_on_its_routes() -> None:
    answer = response("400 Bad Request", b'{"error":{"message":"no such thing","type":"x","param":null,"code":null}}')
    with scripted(answer) as url, gateway(url) as (_, client):
        for stream in (False, True):
            refused = client.post("/v1/messages", json={**BODIES["/v1/messages"], "stream": stream})
            assert refused.status_code == 400
            assert message_error(refused) == {"type": "invalid_request_error", "message": "no such thing"}
