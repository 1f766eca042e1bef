"""The health family answers at once, whatever the server is busy with."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import checkpoints
import httpx2 as httpx
import pytest
import support
from support import chat, eventually, loading, openai_error, running, serving

from serve.engine.echo import EchoEngine
from serve.errors import ModelLoadError


@contextmanager
def asking(url: str) -> Iterator[list[int]]:
    """Ask for ``/health`` again and again in a thread; the statuses so far."""
    statuses: list[int] = []
    is_over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while not is_over.is_set():
                statuses.append(client.get("/health").status_code)
                time.sleep(0.005)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        is_over.set()
        thread.join(60)


def test_health_tells_loading_then_ready() -> None:
    with loading() as (served, gate), httpx.Client(base_url=served.url) as client:
        support.eventually(lambda: client.get("/health").json()["phase"] == "weights")
        assert client.get("/health").json() == {"status": "loading", "phase": "weights", "message": None}
        assert client.get("/health").status_code == 200
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        assert int(ready.headers["retry-after"]) >= 1
        ping = client.get("/ping")
        assert (ping.status_code, ping.content) == (204, b"")

        gate.set()
        support.eventually(lambda: client.get("/ready").status_code == 200)

        assert client.get("/health").json() == {"status": "ready", "phase": None, "message": None}
        assert client.get("/ping").status_code == 200
        phases = client.get("/version").json()["phases"]
        assert set(phases) >= {"tokenizer", "fetch", "weights", "total"}


def test_health_tells_a_failed_load() -> None:
    with loading(ModelLoadError("the weights are torn")) as (served, gate), httpx.Client(base_url=served.url) as client:
        gate.set()
        support.eventually(lambda: client.get("/health").status_code == 503)

        assert client.get("/health").json()["status"] == "dead"
        assert client.get("/health").json()["message"] == "the weights are torn"
        assert client.get("/ready").status_code == 503
        assert client.get("/ping").status_code == 503
        response = client.post("/v1/chat/completions", json=chat("a"))
        assert response.status_code == 503
        assert openai_error(response.json())["message"] == "the weights are torn"


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_health_answers_head_without_a_body(client: httpx.Client, path: str) -> None:
    """Case 48."""
    response = client.head(path)

    assert (response.status_code, response.content) == (200, b"")


def test_health_answers_while_a_load_blocks_its_thread() -> None:
    """Case 53."""
    with loading() as (served, gate), asking(served.url) as statuses:
        support.eventually(lambda: len(statuses) >= 20)
        assert served.lifecycle.state == "loading"
        gate.set()
    assert set(statuses) == {200}


def word_model(folder: Path) -> Path:
    """A folder with a real tokenizer, of words, and weights that nobody reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0, "word": 1, "w" * 64: 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    files = checkpoints.model_files(max_position_embeddings=8192) | {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"chat_template": "{{ messages[-1]['content'] }}"}).encode(),
    }
    return checkpoints.write(folder, files)


def test_health_answers_while_a_long_prompt_is_tokenised(tmp_path: Path) -> None:
    """Case 53: 200 000 words, refused in the end; no single ``/health`` waits for all of it."""
    model = word_model(tmp_path / "words")
    with (
        serving(EchoEngine(), engine="transformers", model=str(model)) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
        asking(served.url) as statuses,
    ):
        body = json.dumps(chat("word " * 200_000) | {"model": "words"})
        support.eventually(lambda: len(statuses) >= 3)
        before = len(statuses)
        responses = [
            client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            for _ in range(3)
        ]
        during = len(statuses) - before

    for response in responses:
        assert response.status_code == 400
        assert openai_error(response.json())["code"] == "context_length_exceeded"
        assert "200000" in response.json()["error"]["message"]
    # One answer before, after and between the requests would come from a loop that tokenises itself.
    assert during > 5
    assert set(statuses) == {200}


WATCH_COLLECTOR = """
import gc, sys, threading, time
def tell():
    while not gc.get_freeze_count():
        time.sleep(0.01)
    time.sleep(0.1)
    sys.stderr.write(f"collecting: {gc.isenabled()}\\n")
threading.Thread(target=tell, daemon=True).start()
"""


def test_garbage_is_collected_again_once_the_port_is_open() -> None:
    with running(before=WATCH_COLLECTOR) as process:
        eventually(lambda: "collecting: " in process.log, timeout_s=30)
        assert "collecting: True" in process.log
