"""What the review of the first day found at the edges of loading, shutting down and failing."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from serve.api.app import create_app, create_lifecycle
from serve.engine.base import EngineConfig
from serve.engine.echo import EchoEngine, EchoRunner
from serve.engine.worker import StepEngine
from serve.errors import ConfigError, GenerationFailed, QueueFull, ShuttingDown
from serve.lifecycle import Lifecycle, State
from serve.settings import Settings
from serve.source import EchoOrigin, choose_origin
from serve.types import FinishReason, GenerationRequest, SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


class SlowOrigin(EchoOrigin):
    """A tokenizer that comes when the test says so."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.gate = threading.Event()

    def load_tokenizer(self):
        self.gate.wait(10)
        return super().load_tokenizer()


def settings(**values) -> Settings:
    return Settings(engine="echo", _env_file=None, **values)  # pyright: ignore[reportCallIssue]


def request(text: str = "hi", max_tokens: int | None = 8) -> GenerationRequest:
    name = f"{time.perf_counter_ns()}"
    return GenerationRequest(
        request_id=name, prompt_token_ids=tuple(text.encode()), params=SamplingParams(max_tokens=max_tokens)
    )


async def finished(stream):
    events = [event async for some in stream for event in some]
    return "".join(event.text for event in events), events[-1]


async def test_requests_that_wait_for_the_tokenizer_are_bounded_and_end_with_the_drain():
    origin = SlowOrigin(settings(max_queue=2))
    lifecycle = Lifecycle(settings(max_queue=2), EchoEngine(), origin)
    lifecycle.start()
    reads = [lifecycle.read(lambda chat: chat.prompt(MESSAGES), time.perf_counter()) for _ in range(5)]
    asked = [asyncio.create_task(read) for read in reads]
    await asyncio.sleep(0.05)
    assert sum(task.done() for task in asked) == 3
    await lifecycle.drain(0.0)
    ended = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
    assert sorted(type(error).__name__ for error in ended) == ["QueueFull"] * 3 + ["ShuttingDown"] * 2
    origin.gate.set()
    await lifecycle.close()


async def test_requests_that_leave_while_the_model_loads_leave_nothing_behind():
    engine = EchoEngine(EngineConfig(max_queue=2))
    for _ in range(50):
        engine.submit(request()).close()
    streams = [engine.submit(request()) for _ in range(2)]
    with pytest.raises(QueueFull):
        engine.submit(request())
    assert len(engine._early) == 2
    assert engine._commands.empty()
    origin = EchoOrigin(settings())
    lifecycle = Lifecycle(settings(), engine, origin)
    lifecycle.start()
    assert [(await finished(stream))[0] for stream in streams] == ["hi", "hi"]
    assert not engine._early
    await lifecycle.close()


async def test_request_without_max_tokens_gets_what_fits_when_the_context_shrank_at_load():
    engine = EchoEngine(EngineConfig(max_model_len=16))
    stream = engine.submit(request("0123456789", max_tokens=None))  # before the model says how much fits
    lifecycle = Lifecycle(settings(), engine, EchoOrigin(settings()))
    lifecycle.start()
    text, last = await finished(stream)
    assert (text, last.finish_reason) == ("012345", FinishReason.LENGTH)
    text, last = await finished(engine.submit(request("x" * 20, max_tokens=None)))
    assert last.error is not None
    assert last.error.param == "messages"
    await lifecycle.close()


async def test_tokens_that_cannot_be_decoded_end_their_own_request_only(caplog):
    lifecycle = Lifecycle(settings(), engine := EchoEngine(), EchoOrigin(settings()))
    lifecycle.start()
    assert (await finished(engine.submit(request())))[0] == "hi"  # loaded

    def decode(token_ids):
        if b"!" in bytes(token_ids):
            raise ValueError("the text was SECRET!")
        return bytes(token_ids).decode()

    object.__setattr__(engine._files, "decode", decode)
    good, bad = engine.submit(request("good")), engine.submit(request("bad!"))
    (text, _), (_, last) = await asyncio.gather(finished(good), finished(bad))
    assert text == "good"
    assert isinstance(last.error, GenerationFailed)
    assert lifecycle.state is State.READY
    assert "SECRET" not in caplog.text
    await lifecycle.close()


async def test_app_that_ended_while_loading_starts_no_engine():
    origin = SlowOrigin(settings())
    lifecycle = Lifecycle(settings(), engine := EchoEngine(), origin)
    lifecycle.start()
    await lifecycle.drain(0.0)
    await lifecycle.close()
    origin.gate.set()
    await asyncio.sleep(0.1)
    assert engine._thread is None


async def test_lifecycle_starts_once():
    lifecycle = Lifecycle(settings(), EchoEngine(), EchoOrigin(settings()))
    lifecycle.start()
    with pytest.raises(RuntimeError, match="create_app"):
        lifecycle.start()
    await lifecycle.drain(0.0)
    with pytest.raises(ShuttingDown):
        lifecycle.check_admission()
    await lifecycle.close()


async def test_step_without_memory_gives_up_the_newest_prompts_and_goes_on():
    from serve.errors import OutOfMemory

    class Tight(EchoRunner):
        def step(self, batch):
            if len(batch.decodes) + len(batch.chunks) > 1:
                raise OutOfMemory("no memory")
            return super().step(batch)

    config = EngineConfig()
    engine = StepEngine(config, Tight(config, step_s=0.01))
    lifecycle = Lifecycle(settings(), engine, EchoOrigin(settings()))
    lifecycle.start()
    first = engine.submit(request("first " * 3, max_tokens=None))
    await first.next()
    second = engine.submit(request("second"))
    (_, one), (_, two) = await asyncio.gather(finished(first), finished(second))
    assert one.finish_reason is FinishReason.STOP
    assert isinstance(two.error, OutOfMemory)
    assert lifecycle.state is State.READY
    assert engine.stats().num_running == 0
    await lifecycle.close()


@pytest.mark.parametrize("values", [{"model": "bad name!!"}, {"model": "m", "chat_template": "/nope.jinja"}])
def test_wrong_settings_are_refused_before_the_port_is_bound(values):
    with pytest.raises(ConfigError):
        choose_origin(Settings(_env_file=None, **values))  # pyright: ignore[reportCallIssue]


async def test_life_that_was_restored_is_ready_at_once_and_has_the_settings_of_now():
    lifecycle = create_lifecycle(settings(max_queue=2))
    lifecycle.prepare()
    for other in (settings(model="owner/other"), settings(max_batch_size=3)):
        with pytest.raises(ConfigError, match="deploy again"):
            lifecycle.restored(other)
    now = settings(max_queue=2, api_keys="changed")
    lifecycle.restored(now)
    assert create_app(now, lifecycle=lifecycle).state.lifecycle is lifecycle
    lifecycle.start()
    assert lifecycle.state is State.READY
    assert {"prepare_tokenizer", "weights", "total"} <= lifecycle.phases.keys()
    assert (await finished(lifecycle.submit(request(), 0.0)))[0] == "hi"
    await lifecycle.close()


async def test_restored_without_a_snapshot_loads_everything():
    lifecycle = create_lifecycle(settings())
    lifecycle.restored(settings(api_keys="other"))
    lifecycle.start()
    assert lifecycle.state is State.READY
    assert not any(name.startswith("prepare") for name in lifecycle.phases)
    await lifecycle.close()
