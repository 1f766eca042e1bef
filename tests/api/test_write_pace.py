"""Writes of streams: as many as tokens when there is room, fewer when a platform makes each of them dear."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import support

from serve.engine.base import EngineConfig
from serve.engine.echo import EchoEngine

TEXT = "coalesced or not, the text is the same " * 3


def stream(url: str) -> tuple[str, int]:
    """The streamed text, and in how many writes it came."""
    body, num_writes = "", 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=support.chat(TEXT, stream=True), timeout=30) as answer:
        for piece in answer.iter_raw():
            body, num_writes = body + piece.decode(), num_writes + 1
    return support.joined(support.sse_chunks(body)), num_writes


def streams(number: int, **settings: Any) -> list[tuple[str, int]]:
    engine = EchoEngine(EngineConfig(max_batch_size=16), step_s=0.005)
    with support.serving(engine, **settings) as served, ThreadPoolExecutor(number) as threads:
        return list(threads.map(stream, [served.url] * number))


def test_tokens_share_a_write_when_many_streams_share_the_writes():
    free, paced, alone = streams(12), streams(12, stream_writes_per_s=60), streams(1, stream_writes_per_s=1000)
    assert {text for text, _ in free + paced + alone} == {TEXT}
    assert sum(number for _, number in paced) < sum(number for _, number in free) / 2
    assert alone[0][1] > len(TEXT) / 2  # one stream is not held back


def test_pace_forgets_streams_that_ended():
    with support.serving(EchoEngine(step_s=0.005), stream_writes_per_s=1000) as served:
        assert stream(served.url)[0] == TEXT
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=support.chat(TEXT, stream=True)) as answer:
            pieces = answer.iter_raw()  # kept: an iterator that is dropped closes the connection
            next(pieces)
        support.eventually(lambda: served.app.state.pace.num_streams == 0)
