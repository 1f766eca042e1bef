"""Several choices of one request: one answer, one stream, one fate."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx2 as httpx
import pytest
from support import chat, eventually, openai_error, scripted_engine, serving, sse_chunks

from serve.engine.base import EngineConfig, StepOutput
from serve.engine.echo import EchoEngine, EchoRunner
from serve.engine.scheduler import Batch
from serve.engine.worker import StepEngine
from serve.errors import OutOfMemory

COMPLETIONS = "/v1/chat/completions"


class SeedRunner(EchoRunner):
    """Answers with its own seed and then with as many letters."""

    def step(self, batch: Batch) -> StepOutput:
        tokens: list[int | None] = []
        for sequence in batch.sampled:
            seed = sequence.request.params.seed or 0
            words = f"{seed}" + "z" * (seed % 10)
            at = len(sequence.output_token_ids)
            tokens.append(ord(words[at]) if at < len(words) else 256)
        return StepOutput(tokens)


@pytest.fixture(scope="module")
def seeded() -> Any:
    config = EngineConfig(max_batch_size=3)
    with serving(StepEngine(config, SeedRunner(config))) as served, httpx.Client(base_url=served.url) as client:
        yield client


def by_index(chunks: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found.setdefault(choice["index"], []).append(choice)
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_choices_streamed_fold_to_the_whole_answer(seeded: httpx.Client, n: int) -> None:
    """Case 10: each index has one role, its own text and exactly one finish reason."""
    fields: dict[str, Any] = {"n": n, "seed": 2, "max_tokens": 6}
    whole = seeded.post(COMPLETIONS, json=chat("prompt", **fields)).json()
    streamed = seeded.post(
        COMPLETIONS, json=chat("prompt", stream=True, stream_options={"include_usage": True}, **fields)
    )
    chunks = sse_chunks(streamed.text)

    assert [choice["index"] for choice in whole["choices"]] == list(range(n))
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert texts == [(f"{2 + at}" + "z" * (2 + at))[:6] for at in range(n)]
    choices = by_index(chunks)
    assert sorted(choices) == list(range(n))
    for index, pieces in choices.items():
        assert [piece["delta"].get("role") for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == texts[index]
        reasons = [piece["finish_reason"] for piece in pieces]
        assert reasons == [None] * (len(pieces) - 1) + [whole["choices"][index]["finish_reason"]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]


def test_choices_count_the_prompt_once(seeded: httpx.Client) -> None:
    usage = seeded.post(COMPLETIONS, json=chat("prompt", n=3, seed=1)).json()["usage"]

    # seeds 1, 2, 3: a digit, as many letters, the end
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (6, 3 + 4 + 5, 18 + 0)


def test_choices_of_the_largest_seed_wrap_around(seeded: httpx.Client) -> None:
    answer = seeded.post(COMPLETIONS, json=chat("a", n=2, seed=2**63 - 1, max_tokens=30)).json()

    assert answer["choices"][1]["message"]["content"].startswith(str(-(2**63)))


@pytest.mark.parametrize("stream", [False, True])
def test_choices_beyond_what_can_ever_wait_are_refused(stream: bool) -> None:
    with serving(EchoEngine(EngineConfig(max_batch_size=2, max_queue=3)), max_queue=3) as served:
        fits = httpx.post(served.url + COMPLETIONS, json=chat("a", n=5))
        refused = httpx.post(served.url + COMPLETIONS, json=chat("a", n=6, stream=stream))

        assert fits.status_code == 200
        assert refused.status_code == 400
        error = openai_error(refused.json())
        assert error["param"] == "n"
        assert "5" in error["message"]


def test_choices_are_queued_together_or_not_at_all() -> None:
    config = EngineConfig(max_batch_size=1, max_queue=3)
    with serving(EchoEngine(config, step_s=0.01), max_queue=3) as served, httpx.Client(base_url=served.url) as client:
        with client.stream("POST", COMPLETIONS, json=chat("x" * 4000, stream=True)) as running:
            lines = running.iter_lines()
            next(lines)
            assert httpx.post(served.url + COMPLETIONS, json=chat("a", n=4)).status_code == 429
            eventually(lambda: served.stats().num_waiting == 0)
            assert served.stats().num_running == 1
        eventually(served.is_idle)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_end_together_when_the_client_leaves(stream: bool) -> None:
    with serving(EchoEngine(EngineConfig(max_batch_size=2), step_s=0.01)) as served:
        body = json.dumps(chat("x" * 4000, n=4, stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
            client.sendall(
                f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            eventually(lambda: served.stats().num_running == 2 and served.stats().num_waiting == 2)
        eventually(served.is_idle, 5)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_fail_together(stream: bool) -> None:
    with serving(scripted_engine([*b"ab", OutOfMemory("no room")])) as served:
        response = httpx.post(served.url + COMPLETIONS, json=chat("x", n=3, stream=stream))

        if stream:
            data = response.text.split("\n\n")
            assert response.text.count('"error"') == 1
            assert data[-2] == "data: [DONE]"
            assert '"finish_reason":"' not in response.text
        else:
            assert response.status_code == 503
            assert openai_error(response.json())["code"] == "out_of_memory"
        eventually(served.is_idle)
