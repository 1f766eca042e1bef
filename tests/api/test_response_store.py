"""Stored responses: kept for their own caller, for a while, and gone on from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
import support
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter
from support import eventually, openai_error, serving

from serve.api.response_store import MAX_FULL_SHELVES, ResponseStore, StoredResponse
from serve.engine.base import EngineConfig
from serve.engine.echo import EchoEngine
from serve.errors import ResponseNotFound

RESPONSES = "/v1/responses"
ITEM: TypeAdapter[Any] = TypeAdapter(ResponseItem)


def ask(text: Any, **fields: Any) -> dict[str, Any]:
    """A request to the echo model."""
    return {"model": "echo", "input": text, **fields}


def create(client: httpx.Client, text: Any, **fields: Any) -> dict[str, Any]:
    """A response that was created."""
    response = client.post(RESPONSES, json=ask(text, **fields))
    assert response.status_code == 200, response.text
    return response.json()


def assert_unknown(client: httpx.Client, response_id: str) -> None:
    path = f"{RESPONSES}/{response_id}"
    for method, where in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        response = client.request(method, path + where)
        assert response.status_code == 404
        assert openai_error(response.json())["type"] == "invalid_request_error"
    response = client.post(RESPONSES, json=ask("a", previous_response_id=response_id))
    assert openai_error(response.json())["code"] == "previous_response_not_found"


def test_store_keeps_a_response_until_it_is_deleted(client: httpx.Client) -> None:
    made = create(client, "héllo")
    path = f"{RESPONSES}/{made['id']}"

    assert client.get(path).json() == made
    assert client.delete(path).json() == {"id": made["id"], "object": "response", "deleted": True}
    assert_unknown(client, made["id"])


def test_store_keeps_what_was_streamed_and_not_what_shall_not_be_kept(client: httpx.Client) -> None:
    streamed = support.named_events(client.post(RESPONSES, json=ask("a", stream=True)).text)[-1]["response"]
    private = create(client, "a", store=False)

    assert client.get(f"{RESPONSES}/{streamed['id']}").json() == streamed
    assert private["store"] is False
    assert_unknown(client, private["id"])


def test_store_shows_each_key_its_own_responses_only() -> None:
    with serving(api_keys="sk-one,sk-two") as served:
        one, two = (httpx.Client(base_url=served.url, headers={"x-api-key": key}) for key in ("sk-one", "sk-two"))
        with one, two:
            made = create(one, "secret")
            assert_unknown(two, made["id"])
            assert one.get(f"{RESPONSES}/{made['id']}").json() == made
            assert httpx.get(f"{served.url}{RESPONSES}/{made['id']}").status_code == 401


def test_store_gives_up_the_oldest_by_count() -> None:
    with serving(stored_responses=2) as served, httpx.Client(base_url=served.url) as client:
        first, *kept = [create(client, f"{at}") for at in range(3)]
        assert_unknown(client, first["id"])
        assert [client.get(f"{RESPONSES}/{made['id']}").status_code for made in kept] == [200, 200]


def test_store_gives_up_the_oldest_by_size() -> None:
    limit = 20_000
    with serving(stored_response_bytes=limit) as served, httpx.Client(base_url=served.url) as client:
        made = [create(client, "a" * 1500) for _ in range(12)]
        answers = [client.get(f"{RESPONSES}/{response['id']}") for response in made]
        kept = [answer.status_code == 200 for answer in answers]
        assert kept == sorted(kept)  # the newest
        assert 2 <= sum(kept) < 12
        assert sum(len(answer.content) for answer in answers if answer.status_code == 200) <= limit
        assert_unknown(client, made[0]["id"])

        larger = create(client, "b", instructions="b" * limit)
        assert_unknown(client, larger["id"])


def test_store_bounds_what_all_callers_have_together() -> None:
    """An issuer of tokens knows any number of callers."""
    store = ResponseStore(max_responses=10, max_bytes=100)

    def put(caller: str) -> None:
        response: Any = SimpleNamespace(id=f"of {caller}")
        store.put(caller, StoredResponse(response, (), (), 60))

    def has(caller: str) -> bool:
        try:
            return bool(store.get(caller, f"of {caller}"))
        except ResponseNotFound:
            return False

    callers = [f"caller {at}" for at in range(2 * MAX_FULL_SHELVES)]
    for caller in callers:
        put(caller)
    kept = [caller for caller in callers if has(caller)]
    assert kept == callers[-len(kept) :]
    assert 60 * len(kept) <= MAX_FULL_SHELVES * 100 < 60 * (len(kept) + 1)
    store.delete(kept[-1], f"of {kept[-1]}")
    put("another")
    assert [caller for caller in callers if has(caller)] == kept[:-1]  # what was deleted made room


def test_store_can_be_turned_off() -> None:
    with serving(stored_responses=0) as served, httpx.Client(base_url=served.url) as client:
        made = create(client, "a", store=True)
        assert made["store"] is False
        assert_unknown(client, made["id"])
        assert client.post(RESPONSES, json=ask("a", background=True)).status_code == 400


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that answers with what the template was given."""
    template = tmp_path_factory.mktemp("template") / "all.jinja"
    template.write_text("{% for m in messages %}({{ m.role }} {{ m.content }}){% endfor %}", encoding="utf-8")
    with serving(chat_template=template) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def test_store_lets_a_conversation_go_on(written: httpx.Client) -> None:
    def text(response: dict[str, Any]) -> str:
        return response["output"][0]["content"][0]["text"]

    first = create(written, "A", instructions="I")
    second = create(written, [{"role": "user", "content": "B"}], previous_response_id=first["id"])
    written.delete(f"{RESPONSES}/{first['id']}")
    third = create(written, "C", previous_response_id=second["id"], instructions="J")

    assert text(first) == "(system I)(user A)"
    assert text(second) == "(user A)(assistant (system I)(user A))(user B)"  # instructions are of one response
    assert text(third) == f"(system J)(user A)(assistant {text(first)})(user B)(assistant {text(second)})(user C)"
    assert third["previous_response_id"] == second["id"]


def test_store_lists_input_items_page_by_page(client: httpx.Client) -> None:
    items = [
        {"role": "user", "content": "A", "id": "msg_own"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "C"}]},
        {"type": "function_call", "call_id": "call_1", "name": "get", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "R"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "D"}]},
    ]
    path = f"{RESPONSES}/{create(client, items)['id']}/input_items"
    listed = client.get(path, params={"order": "asc"}).json()

    for item in listed["data"]:
        ITEM.validate_python(item, strict=True)
    assert [item["type"] for item in listed["data"]] == [
        "message", "reasoning", "message", "function_call", "function_call_output", "message"
    ]  # fmt: skip
    assert listed["data"][0]["id"] == "msg_own"
    assert len({item["id"] for item in listed["data"]}) == 6
    assert listed["has_more"] is False
    backwards = client.get(path).json()["data"]
    assert backwards == listed["data"][::-1]
    paged: list[dict[str, Any]] = []
    for _ in itertools.count():
        after = {"after": paged[-1]["id"]} if paged else {}
        page = client.get(path, params={"order": "asc", "limit": 4, **after}).json()
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        paged += page["data"]
        if not page["has_more"]:
            break
    assert paged == listed["data"]
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_x"}):
        response = client.get(path, params=wrong)
        assert (response.status_code, openai_error(response.json())["param"]) == (400, next(iter(wrong)))


def test_store_does_not_stream_again(client: httpx.Client) -> None:
    response = client.get(f"{RESPONSES}/{create(client, 'a')['id']}", params={"stream": True})

    assert openai_error(response.json())["param"] == "stream"


def test_background_goes_on_without_a_connection() -> None:
    with (
        serving(EchoEngine(EngineConfig(), step_s=0.002)) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        made = create(client, "x" * 100, background=True)
        path = f"{RESPONSES}/{made['id']}"

        assert (made["status"], made["background"], made["usage"]) == ("in_progress", True, None)
        eventually(lambda: client.get(path).json()["status"] == "completed")
        done = client.get(path).json()
        assert done["output"][0]["content"][0]["text"] == "x" * 100
        assert client.post(path + "/cancel").json() == done
        assert create(client, "y", previous_response_id=made["id"])["status"] == "completed"


def test_background_ends_when_it_is_cancelled_or_deleted() -> None:
    with (
        serving(EchoEngine(EngineConfig(), step_s=0.005)) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        paths = [f"{RESPONSES}/{create(client, 'x' * 4000, background=True)['id']}" for _ in range(2)]
        eventually(lambda: all(client.get(path).json()["output"] for path in paths))
        assert_still_running = client.post(RESPONSES, json=ask("a", previous_response_id=paths[0].split("/")[-1]))
        assert openai_error(assert_still_running.json())["code"] == "previous_response_not_found"

        cancelled = client.post(paths[0] + "/cancel").json()
        assert (cancelled["status"], cancelled["output"][0]["status"]) == ("cancelled", "incomplete")
        assert client.get(paths[0]).json() == cancelled
        assert client.post(paths[0] + "/cancel").json() == cancelled
        assert client.delete(paths[1]).status_code == 200
        assert client.get(paths[1]).status_code == 404
        eventually(served.is_idle)


def test_background_tells_of_a_failure() -> None:
    with serving(support.scripted_engine([*b"ab", None])) as served, httpx.Client(base_url=served.url) as client:
        path = f"{RESPONSES}/{create(client, 'a', background=True)['id']}"
        eventually(lambda: client.get(path).json()["status"] == "failed")
        assert client.get(path).json()["error"]["code"] == "server_error"


def test_cancel_is_for_the_background_only(client: httpx.Client) -> None:
    response = client.post(f"{RESPONSES}/{create(client, 'a')['id']}/cancel")

    assert response.status_code == 400
    assert "background" in openai_error(response.json())["message"]
