"""The gateway in front of RunPod's queue: the real worker behind the local control plane."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx
from runpod_local import LocalRunpod, WorkerProcess
from support import chat, eventually, joined, openai_error, serving, sse_chunks

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


def test_client_that_leaves_cancels_the_job(slow: tuple[LocalRunpod, WorkerProcess]) -> None:
    local, _ = slow
    with gateway(local) as client:
        with client.stream("POST", COMPLETIONS, json=chat("x" * 1500, stream=True)) as answer:
            next(answer.iter_lines())
        eventually(lambda: any(job.status.value == "CANCELLED" for job in local.plane.board.jobs.values()))


def sse_chunks_of(client: httpx.Client, text: str) -> list[dict[str, object]]:
    body = client.post(COMPLETIONS, json=chat(text, stream=True)).text
    return sse_chunks(body)
