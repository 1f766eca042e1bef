"""The gateway in front of RunPod's queue: the real worker behind the local control plane."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx
import pytest
from click.testing import CliRunner
from fake_runpod import serving_runpod_api
from runpod_local import LocalRunpod, WorkerProcess
from support import chat, eventually, joined, message_error, named_events, openai_error, serving, sse_chunks

from trimaran.cli import main
from trimaran.deploy import on_runpod

COMPLETIONS = "/v1/chat/completions"


@contextmanager
def gateway(local: LocalRunpod) -> Iterator[httpx.Client]:
    plane = local.plane
    url = f"{local.url}/v2/{plane.endpoint}"
    with (
        serving(engine="remote", remote_url=url, remote_api_key=plane.key, keep_alive_s=0.3) as served,
        httpx.Client(base_url=served.url, timeout=30) as client,
    ):
        yield client


def test_queue_answers_and_streams_through_the_gateway(runpod: LocalRunpod) -> None:
    with gateway(runpod) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "echo"
        plain = client.post(COMPLETIONS, json=chat("queued")).json()
        assert plain["choices"][0]["message"]["content"] == "queued"
        assert joined(sse_chunks_of(client, "streamed")) == "streamed"
        refused = client.post(COMPLETIONS, json={"model": "other", "messages": [{"role": "user", "content": "a"}]})
        assert (refused.status_code, openai_error(refused.json())["code"]) == (404, "model_not_found")


def test_every_wire_passes_the_queue(runpod: LocalRunpod) -> None:
    with gateway(runpod) as client:
        assert client.post("/v1/completions", json={"model": "echo", "prompt": "p"}).json()["choices"][0]["text"] == "p"
        message = client.post("/v1/messages", json=chat("m", max_tokens=9)).json()
        assert message["content"][0]["text"] == "m"
        streamed = client.post("/v1/messages", json=chat("m", max_tokens=9, stream=True)).text
        assert named_events(streamed)[-1] == {"type": "message_stop"}
        assert client.post("/v1/messages/count_tokens", json=chat("m")).json()["input_tokens"] > 0
        tokens = client.post("/tokenize", json={"prompt": "abc"}).json()["tokens"]
        assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "abc"
        unknown = client.post("/v1/embeddings", json={"model": "other", "input": "e"})
        assert (unknown.status_code, openai_error(unknown.json())["code"]) == (404, "model_not_found")


def test_stored_response_is_reached_through_the_queue(runpod: LocalRunpod) -> None:
    with gateway(runpod) as client:
        made = client.post("/v1/responses", json={"model": "echo", "input": "kept"}).json()["id"]
        assert client.get(f"/v1/responses/{made}").json()["id"] == made
        items = client.get(f"/v1/responses/{made}/input_items", params={"limit": 1}).json()["data"]
        assert items[0]["content"][0]["text"] == "kept"
        assert client.post(f"/v1/responses/{made}/cancel").status_code == 400
        assert client.delete(f"/v1/responses/{made}").json()["deleted"] is True
        assert client.get(f"/v1/responses/{made}").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_refusal_keeps_its_status_and_form_through_the_queue(runpod: LocalRunpod, stream: bool) -> None:
    with gateway(runpod) as client:
        refused = client.post("/v1/messages", json={**chat("m", max_tokens=9, stream=stream), "model": "other"})
        assert (refused.status_code, message_error(refused)["type"]) == (404, "not_found_error")
        refused = client.post(COMPLETIONS, json={**chat("m", stream=stream), "model": "other"})
        assert (refused.status_code, openai_error(refused.json())["code"]) == (404, "model_not_found")


def test_client_that_leaves_cancels_the_job(slow: tuple[LocalRunpod, WorkerProcess]) -> None:
    local, _ = slow
    with gateway(local) as client:
        with client.stream("POST", COMPLETIONS, json=chat("x" * 1500, stream=True)) as answer:
            lines = answer.iter_lines()  # kept: an iterator that is dropped closes the connection
            next(lines)
        eventually(lambda: any(job.status.value == "CANCELLED" for job in local.plane.board.jobs.values()))


def sse_chunks_of(client: httpx.Client, text: str) -> list[dict[str, object]]:
    body = client.post(COMPLETIONS, json=chat(text, stream=True)).text
    return sse_chunks(body)


def test_deploy_of_a_queue_is_verified_through_the_queue(runpod: LocalRunpod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_runpod, "POLL_S", 0.0)
    with serving_runpod_api() as fake:
        fake.key, fake.queue = runpod.plane.key, runpod.base
        monkeypatch.setenv("RUNPOD_API_KEY", fake.key)
        monkeypatch.setenv("RUNPOD_API_URL", fake.url)
        done = CliRunner().invoke(
            main, ["deploy", "runpod", "--name", "q", "--image", "i:1", "--env", "SERVE_ENGINE=echo", "--verify"]
        )
    assert done.exit_code == 0, done.output
    assert "routes refuse no key and a wrong key, by RunPod in front" in done.stderr
    assert "skipped  realtime: RunPod's queue passes no WebSocket" in done.stderr
    assert done.stdout == f"{runpod.base}/openai/v1\n"
