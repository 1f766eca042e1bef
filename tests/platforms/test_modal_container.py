"""The deployed app in Modal's real container entry point, which sees only what the deploy sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from modal_local import KEY, Deployed, client, deployed
from support import chat, eventually, joined, openai_error, sse_chunks
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from trimaran.emulate.modal.container import Container
from trimaran.emulate.modal.session import ask

COMPLETIONS = "/v1/chat/completions"
LONG = "word " * 400


@pytest.fixture(scope="module")
def web() -> Iterator[Deployed]:
    with deployed(SERVE_MAX_BATCH_SIZE="16", SERVE_MAX_QUEUE="16") as made:
        yield made


@pytest.fixture(scope="module")
def served(web) -> Iterator[Container]:
    """One container that most tests share."""
    with web.container() as container:
        yield container


@pytest.fixture
def http(served) -> Iterator[httpx.Client]:
    with client(served) as made:
        yield made


def num_running(http: httpx.Client) -> int:
    found = re.search(r"^trimaran_requests_running(?:\{[^}]*\})? (\d+)", http.get("/metrics").text, re.MULTILINE)
    assert found, http.get("/metrics").text
    return int(found[1])


def test_snapshot_comes_between_the_stages_and_holds_no_file(web, served):
    names = [name for name, _ in web.emulator.requests]
    assert names.index("ContainerCheckpoint") < names.index("FunctionGetInputs")
    assert served.held_at_checkpoint == []
    with client(served) as http:
        assert "prepare_tokenizer" in http.get("/version").json()["phases"]


def test_no_call_was_answered_by_default(web, served):
    assert web.emulator.unanswered <= {"AppHeartbeat", "ContainerHello", "AppClientDisconnect", "VolumeCommit"}


def test_plain_answer_and_errors_keep_their_shape(served, http):
    answer = http.post(COMPLETIONS, json=chat("hello")).json()
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert http.get("/ready").status_code == 200
    refused = httpx.post(f"{served.url}{COMPLETIONS}", json=chat("hello"), timeout=30)
    assert refused.status_code == 401
    assert openai_error(refused.json())["code"] == "invalid_api_key"
    assert http.get("/nowhere").status_code == 404
    assert openai_error(http.post(COMPLETIONS, content=b"{", headers={"content-type": "application/json"}).json())


def test_static_pages_are_there(http):
    assert "<html" in http.get("/").text.lower()


def test_stream_comes_piece_by_piece(http):
    pieces: list[bytes] = []
    with http.stream("POST", COMPLETIONS, json=chat(LONG, stream=True)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for piece in answer.iter_raw():
            pieces.append(piece)
    assert joined(sse_chunks(b"".join(pieces).decode())) == LONG
    assert len(pieces) > 5


def test_many_streams_at_once_in_one_container(served, http):
    def one(number: int) -> str:
        with client(served) as own:
            return joined(sse_chunks(own.post(COMPLETIONS, json=chat(f"r{number} " * 50, stream=True)).text))

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(one, range(12))) == [f"r{number} " * 50 for number in range(12)]


def test_body_of_many_messages_arrives_whole(http):
    answer = http.post(COMPLETIONS, json=chat("x" * 7000, max_tokens=4, padding="y" * 300_000)).json()
    assert answer["usage"]["prompt_tokens"] == 7000
    assert answer["choices"][0]["message"]["content"] == "xxxx"


def test_websocket_answers_and_closes(served):
    address = served.url.replace("http://", "ws://") + "/v1/realtime/chat"
    with connect(address, additional_headers={"authorization": f"Bearer {KEY}"}, proxy=None) as socket:
        for text in ("one turn", "another"):
            socket.send(json.dumps(chat(text)))
            chunks: list[dict[str, Any]] = []
            while "type" not in (event := json.loads(socket.recv(timeout=20))):
                chunks.append(event)
            assert joined(chunks) == text
    with pytest.raises(InvalidStatus):
        connect(address, proxy=None)


@pytest.fixture(scope="module")
def slow() -> Iterator[tuple[Deployed, Container]]:
    """20 ms a token: long enough to be left alone."""
    with deployed(SERVE_MAX_BATCH_SIZE="4") as made:
        slowed = made.emulator.store.content(_hash_of(made, "/root/serve/engine/echo.py"))
        text = slowed.read_text().replace("step_s: float = 0.0", "step_s: float = 0.02")
        slowed.unlink()
        slowed.write_text(text)
        with made.container() as container:
            yield made, container


def _hash_of(made: Deployed, name: str) -> str:
    files = [file for mount in made.function.mount_ids for file in made.emulator.mounts[mount]]
    return next(file.sha256_hex for file in files if file.filename == name)


def test_client_that_leaves_frees_its_slot(slow):
    _, container = slow
    with client(container) as http:
        with http.stream("POST", COMPLETIONS, json=chat(LONG, stream=True)) as answer:
            pieces = answer.iter_raw()  # kept: an iterator that is dropped closes the connection
            next(pieces)
            eventually(lambda: num_running(http) == 1)
        eventually(lambda: num_running(http) == 0)


def test_cancelled_call_frees_its_slot(slow):
    made, container = slow
    with client(container) as http, ThreadPoolExecutor(1) as threads:
        asking = threads.submit(http.post, COMPLETIONS, json=chat(LONG))
        eventually(lambda: num_running(http) == 1)
        call = next(call for call in made.emulator.calls.values() if call.path == COMPLETIONS)
        made.emulator.on_loop(lambda: made.emulator.cancel(call))
        eventually(lambda: num_running(http) == 0)
        assert asking.result(10).status_code == 500  # nobody is there on the real platform


def test_stream_that_runs_when_the_container_ends_is_finished(slow):
    _, container = slow
    with client(container) as http, http.stream("POST", COMPLETIONS, json=chat("to the end", stream=True)) as answer:
        pieces = answer.iter_raw()
        first = next(pieces)
        with ThreadPoolExecutor(1) as threads:
            ended = threads.submit(container.stop)
            assert joined(sse_chunks((first + b"".join(pieces)).decode())) == "to the end"
            assert ended.result(30) == 0
    assert "Traceback" not in container.log()


def test_start_that_fails_reports_its_traceback():
    with deployed() as made, made.container(wait=False, SERVE_MAX_QUEUE="many") as container:
        eventually(lambda: container.process.poll() is not None, timeout_s=30)
        assert made.emulator.failures
        assert "SERVE_MAX_QUEUE" in made.emulator.failures[0].traceback
        assert "ConfigError" in made.emulator.failures[0].exception


def test_source_that_was_not_mounted_is_missed():
    with deployed() as made:
        mounts = made.emulator.mounts
        for mount_id in made.function.mount_ids:
            mounts[mount_id] = [file for file in mounts[mount_id] if "/serve/" not in file.filename]
        with made.container(wait=False) as container:
            eventually(lambda: container.process.poll() is not None, timeout_s=30)
            assert "No module named 'serve'" in container.log()


def test_server_answers_on_its_port_and_drains():
    with deployed(SERVE_MODAL_PRIMITIVE="server") as made, made.container() as container:
        text = "".join(ask(container.url, KEY, "over the port"))
        assert text == "over the port"
        assert container.stop() == 0
        assert "draining" in container.log()
        assert "Traceback" not in container.log()


@pytest.fixture(scope="module")
def real(demo_model, demo_embedding) -> Iterator[Container]:
    """SmolLM2 with MiniLM beside it, uploaded from their folders."""
    models = {"SERVE_MODEL": str(demo_model), "SERVE_EMBEDDING_MODEL": str(demo_embedding)}
    with deployed(SERVE_ENGINE="", SERVE_MAX_MODEL_LEN="512", SERVE_TOOL_PROMPT="generic", **models) as made:
        assert "SmolLM2-135M-Instruct" in made.output
        with made.container() as container:
            yield container


def test_real_model_is_uploaded_prepared_restored_and_answers(real, demo_model, demo_embedding):
    assert real.held_at_checkpoint == []
    pieces = list(ask(real.url, KEY, "What is the capital of France?"))
    assert "Paris" in "".join(pieces)
    assert len(pieces) > 5
    with client(real) as http:
        phases = http.get("/version").json()["phases"]
        assert {"prepare_weights", "weights", "warm_up"} <= set(phases)
        names = [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert names == [demo_model.name, demo_embedding.name]


def test_real_model_answers_on_every_wire(real, demo_model, demo_embedding):
    name = demo_model.name
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    closed = {**schema, "additionalProperties": False}
    messages = [{"role": "user", "content": "Weather in Rome?"}]
    with client(real) as http:

        def post(path: str, **body: Any) -> dict[str, Any]:
            answer = http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        tool = {"type": "function", "function": {"name": "weather", "parameters": closed}}
        answer = post(COMPLETIONS, model=name, messages=messages, tools=[tool], tool_choice="required", max_tokens=60)
        call = answer["choices"][0]["message"]["tool_calls"][0]
        assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")

        wanted = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": closed}}
        answer = post(COMPLETIONS, model=name, messages=messages, response_format=wanted, max_tokens=60)
        assert json.loads(answer["choices"][0]["message"]["content"])["city"] in ("Rome", "Oslo")

        assert post("/v1/responses", model=name, input="Hi", max_output_tokens=4)["usage"]["output_tokens"] == 4
        assert post("/v1/messages", model=name, messages=messages, max_tokens=4)["usage"]["output_tokens"] == 4
        assert post("/v1/completions", model=name, prompt="One, two", max_tokens=4)["choices"][0]["text"]
        assert len(post("/v1/embeddings", model=demo_embedding.name, input="a cat")["data"][0]["embedding"]) == 384


def test_snapshot_off_loads_straight():
    with (
        deployed(SERVE_MODAL_SNAPSHOT="off", SERVE_MAX_QUEUE="3") as made,
        made.container() as container,
        client(container) as http,
    ):
        assert not any(name.startswith("prepare") for name in http.get("/version").json()["phases"])
        assert "ContainerCheckpoint" not in [name for name, _ in made.emulator.requests]
