"""What can wait is done once: when the engine is first idle, or after many steps where it never is."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext

from serve.engine import worker
from serve.engine.base import EngineConfig, ModelFiles
from serve.engine.echo import EOS_TOKEN_ID, EchoRunner, decode, encode
from serve.engine.worker import StepEngine
from serve.types import GenerationRequest, SamplingParams


class LaterRunner(EchoRunner):
    """Notes on which thread, and after how many steps, it was asked for what can wait."""

    def __init__(self) -> None:
        super().__init__(EngineConfig())
        self.num_steps = 0
        self.settled: list[tuple[str, int]] = []
        self.is_settled = threading.Event()

    def step(self, batch):
        self.num_steps += 1
        return super().step(batch)

    def settle(self) -> None:
        self.settled.append((threading.current_thread().name, self.num_steps))
        self.is_settled.set()


def started(runner: LaterRunner) -> StepEngine:
    engine = StepEngine(EngineConfig(), runner)
    files = ModelFiles(folder=None, decode=decode, eos_token_ids=frozenset({EOS_TOKEN_ID}), max_model_len=4096)  # pyright: ignore[reportArgumentType]
    engine.load(files, lambda _: nullcontext())
    return engine


async def answer(engine: StepEngine, text: str) -> str:
    params = SamplingParams(max_tokens=len(text))
    request = GenerationRequest(request_id=text, prompt_token_ids=tuple(encode(text)), params=params)
    stream = engine.submit(request)
    return "".join([event.text async for events in stream for event in events])


async def test_idle_engine_does_what_can_wait_once(monkeypatch):
    monkeypatch.setattr(worker, "QUIET_S", 0.01)
    runner = LaterRunner()
    engine = started(runner)
    early = asyncio.ensure_future(answer(engine, "early"))
    await asyncio.sleep(0)
    engine.start(lambda _: None)
    assert await early == "early"
    assert await asyncio.to_thread(runner.is_settled.wait, 10)
    assert await answer(engine, "later") == "later"
    await asyncio.sleep(0.05)
    await engine.close()
    assert runner.settled == [("engine", 5)], "after the request that was there, and never again"


async def test_engine_that_is_never_idle_does_it_after_many_steps(monkeypatch):
    monkeypatch.setattr(worker, "QUIET_S", 1000.0)
    monkeypatch.setattr(worker, "LATER_STEPS", 3)
    runner = LaterRunner()
    engine = started(runner)
    engine.start(lambda _: None)
    assert await answer(engine, "a long answer") == "a long answer"
    await engine.close()
    assert runner.settled == [("engine", 3)]
