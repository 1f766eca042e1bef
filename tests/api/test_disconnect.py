"""A client that is gone costs nothing more, and the others do not notice."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest
from support import Served, chat, eventually, joined, openai_error, serving, sse_chunks

from serve.engine.base import EngineConfig
from serve.engine.echo import EchoEngine

COMPLETIONS = "/v1/chat/completions"


def request_bytes(text: str, **fields: Any) -> bytes:
    body = json.dumps(chat(text, **fields)).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    return head.encode() + b"Connection: close\r\n\r\n" + body


@contextmanager
def one_slot(*, max_queue: int = 64, step_s: float = 0.01) -> Iterator[Served]:
    config = EngineConfig(max_batch_size=1, max_queue=max_queue)
    with serving(EchoEngine(config, step_s=step_s)) as served:
        yield served


def start(served: Served, text: str, **fields: Any) -> socket.socket:
    """Send a request and do not read the answer."""
    client = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    client.sendall(request_bytes(text, **fields))
    return client


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_slot(stream: bool) -> None:
    """Case 42: the rest of 4000 tokens, 40 s of work, is not done for nobody."""
    with one_slot() as served:
        abandoned = start(served, "x" * 4000, stream=stream)
        eventually(lambda: served.stats().num_running == 1 and served.stats().num_steps > 20)
        abandoned.close()

        answer = httpx.post(served.url + COMPLETIONS, json=chat("next", max_tokens=2), timeout=20).json()

        assert answer["choices"][0]["message"]["content"] == "ne"
        assert served.is_idle()
        num_steps = served.stats().num_steps
        assert num_steps < 3000
        assert served.stats().num_steps == num_steps


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_leaves_the_queue(stream: bool) -> None:
    with one_slot(max_queue=1) as served:
        running = start(served, "x" * 4000, stream=True)
        eventually(lambda: served.stats().num_running == 1)
        waiting = start(served, "never", stream=stream)
        eventually(lambda: served.stats().num_waiting == 1)

        waiting.close()

        eventually(lambda: served.stats().num_waiting == 0)
        assert served.stats().num_running == 1
        running.close()
        eventually(served.is_idle)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_of_nobody_and_a_full_queue_give_429(stream: bool) -> None:
    """Case 47."""
    with one_slot(max_queue=1) as served:
        running, waiting = start(served, "x" * 4000, stream=True), start(served, "y", stream=True)
        eventually(lambda: served.stats().num_running == 1 and served.stats().num_waiting == 1)

        response = httpx.post(served.url + COMPLETIONS, json=chat("no room", stream=stream))

        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        error = openai_error(response.json())
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        running.close()
        assert b"[DONE]" in waiting.makefile("rb").read()
        waiting.close()
        eventually(served.is_idle)


def test_disconnect_while_the_body_is_sent_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "serve")
    with serving() as served:
        for _ in range(3):
            client = socket.create_connection(("127.0.0.1", served.port), timeout=20)
            client.sendall(request_bytes("cut off")[:-5])
            client.close()
        eventually(lambda: sum("route=/v1" in record.getMessage() for record in caplog.records) >= 3, 5)

    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert not any(getattr(record, "status", 0) == 500 for record in caplog.records)


def test_disconnect_of_half_the_streams_harms_no_other() -> None:
    """Case 44."""
    dice = random.Random(44)
    plans = [(f"stream {at} " + "abc" * 40, dice.randrange(0, 12_000) if at % 2 else None) for at in range(50)]

    async def read(port: int, text: str, num_bytes: int | None) -> str | None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request_bytes(text, stream=True, stream_options={"include_usage": True}))
            await writer.drain()
            if num_bytes is None:
                return (await reader.read()).decode()
            async with asyncio.timeout(30):
                await reader.readexactly(num_bytes)
            return None
        finally:
            writer.transport.abort() if num_bytes is not None else writer.close()

    async def everyone(port: int) -> list[str | None]:
        return await asyncio.gather(*(read(port, *plan) for plan in plans))

    with serving(EchoEngine(EngineConfig(max_batch_size=4), step_s=0.001)) as served:
        answers = asyncio.run(everyone(served.port))

        for (text, num_bytes), answer in zip(plans, answers, strict=True):
            if num_bytes is None:
                assert answer is not None
                # The chunked transfer's own lines are no events.
                chunks = sse_chunks(answer)
                assert joined(chunks) == text
                assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        eventually(served.is_idle)
        again = httpx.post(served.url + COMPLETIONS, json=chat("still here"))
        assert again.json()["choices"][0]["message"]["content"] == "still here"


def test_disconnect_of_a_slow_reader_does_not_hold_up_others() -> None:
    with serving(EchoEngine(step_s=0.0005)) as served:
        slow = start(served, "x" * 4000, stream=True)
        eventually(lambda: served.stats().num_running == 1)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda at: httpx.post(served.url + COMPLETIONS, json=chat(f"{at}")), range(16)))

        assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [
            str(at) for at in range(16)
        ]
        assert slow.makefile("rb").read().count(b"[DONE]") == 1
        slow.close()
        eventually(served.is_idle)
