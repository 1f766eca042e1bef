"""A server whose engine hangs or gives rubbish says so and ends; an idle one proves that it is not dead."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable

import httpx2 as httpx
import pytest
import support
from support import chat, openai_error, running, serving

from serve import watchdog
from serve.engine.base import EngineConfig, StepOutput
from serve.engine.echo import EchoRunner
from serve.engine.scheduler import Batch
from serve.engine.worker import StepEngine

COMPLETIONS = "/v1/chat/completions"


class FaultyRunner(EchoRunner):
    """An echo with a fault: ``before`` runs before each step, and prompts that hold ``poison`` give rows of NaN."""

    def __init__(self, before: Callable[[], object] = lambda: None, poison: bytes = b"\xff") -> None:
        super().__init__(EngineConfig())
        self.before = before
        self.poison = poison

    def step(self, batch: Batch) -> StepOutput:
        self.before()
        output = super().step(batch)
        bad = [self.poison in bytes(sequence.prompt_token_ids) for sequence in batch.sampled]
        return StepOutput([None if is_bad else token for token, is_bad in zip(output.token_ids, bad, strict=True)])


def engine(runner: EchoRunner) -> StepEngine:
    return StepEngine(EngineConfig(), runner)


def test_process_exits_70_when_a_step_hangs() -> None:
    hang = (
        "import time\nfrom serve.engine import echo, pulse\ndef step(*_): time.sleep(3600)\n"
        "echo.EchoRunner.step, pulse.LAST_STEP_S = step, 0.1"
    )
    with running(before=hang, SERVE_STEP_TIMEOUT_S="0.5") as server:
        response = httpx.post(server.url + COMPLETIONS, json=chat("a"), timeout=30)

        assert response.status_code == 503
        assert openai_error(response.json())["code"] == "engine_dead"
        assert "hangs" in openai_error(response.json())["message"]
        assert server.process.wait(20) == 70
        assert "SERVE_STEP_TIMEOUT_S=0.5" in server.log


def test_health_is_503_once_a_step_hangs() -> None:
    release = threading.Event()
    runner = FaultyRunner(before=lambda: release.wait(30))
    with serving(engine(runner), step_timeout_s=0.3) as served, httpx.Client(base_url=served.url) as client:
        try:
            response = client.post(COMPLETIONS, json=chat("a"))
            assert response.status_code == 503
            for path in ("/health", "/ready", "/ping"):
                assert client.get(path).status_code == 503, path
        finally:
            release.set()


def test_health_is_503_once_the_loop_hangs_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar, the scheduler, a detokenizer: whatever the loop does can hang, not the model alone."""
    release = threading.Event()
    monkeypatch.setattr("serve.engine.steps.fitted", lambda *_: release.wait(30))
    with serving(step_timeout_s=0.3) as served, httpx.Client(base_url=served.url) as client:
        try:
            assert openai_error(client.post(COMPLETIONS, json=chat("a")).json())["code"] == "engine_dead"
            assert client.get("/health").status_code == 503
        finally:
            release.set()


def test_server_that_was_frozen_in_a_step_goes_on() -> None:
    slow = "from serve.engine import echo; echo.EchoEngine.__init__.__kwdefaults__['step_s'] = 0.3"
    with running(before=slow, SERVE_STEP_TIMEOUT_S="1") as server, httpx.Client(base_url=server.url) as client:
        with client.stream("POST", COMPLETIONS, json=chat("abc", stream=True), timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(1.5)
            server.process.send_signal(signal.SIGCONT)
            assert "data: [DONE]" in list(lines)
        assert client.get("/health").status_code == 200


def test_health_is_503_once_something_else_that_has_steps_hangs() -> None:
    reasons: list[str] = []

    async def watch() -> None:
        others = {"embedding model": lambda: 9.0}
        guard = watchdog.Watchdog(engine(FaultyRunner()), 0.2, lambda error: reasons.append(error.message), others)
        guard.start()
        await asyncio.sleep(0.2)
        guard.stop()

    asyncio.run(watch())
    assert len(reasons) == 1
    assert reasons[0].startswith("the embedding model hangs")


def test_slow_steps_are_no_hang() -> None:
    runner = FaultyRunner(before=lambda: time.sleep(0.2))
    with serving(engine(runner), step_timeout_s=2) as served, httpx.Client(base_url=served.url) as client:
        response = client.post(COMPLETIONS, json=chat("x" * 12), timeout=30)

        assert response.status_code == 200
        assert client.get("/health").status_code == 200


def test_server_survives_a_client_that_sends_poison_again_and_again() -> None:
    """Rows of NaN are that client's own affair as long as a canary comes through."""
    with serving(engine(FaultyRunner(poison=b"poison"))) as served, httpx.Client(base_url=served.url) as client:
        for _ in range(watchdog.BAD_STEPS + 2):
            response = client.post(COMPLETIONS, json=chat("poison"))
            assert response.status_code == 500
            assert openai_error(response.json())["code"] == "generation_failed"
        support.eventually(lambda: served.stats().num_bad_steps == 0)  # the canary's token

        assert client.post(COMPLETIONS, json=chat("ab")).json()["choices"][0]["message"]["content"] == "ab"
        assert client.get("/ready").status_code == 200


def test_server_dies_when_no_request_gives_finite_logits() -> None:
    with serving(engine(FaultyRunner(poison=b""))) as served, httpx.Client(base_url=served.url) as client:
        for _ in range(watchdog.BAD_STEPS):
            client.post(COMPLETIONS, json=chat("a"))
        support.eventually(lambda: client.get("/health").status_code == 503)

        assert "not finite" in client.get("/health").json()["message"]
        assert openai_error(client.post(COMPLETIONS, json=chat("a")).json())["code"] == "engine_dead"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "QUIET_S", 0.1)
    monkeypatch.setattr(watchdog, "CANARY_LIMIT_S", 0.2)


@pytest.mark.usefixtures("impatient")
def test_ready_of_an_idle_server_is_proven_by_a_canary() -> None:
    with serving() as served, httpx.Client(base_url=served.url) as client:
        time.sleep(0.2)
        before = served.stats().num_steps
        assert client.get("/ready").status_code == 200
        support.eventually(lambda: served.stats().num_steps > before and served.is_idle())


@pytest.mark.usefixtures("impatient")
def test_ready_is_503_while_a_step_takes_too_long_to_be_answering() -> None:
    release = threading.Event()
    with (
        serving(engine(FaultyRunner(before=lambda: release.wait(30)))) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        asking = threading.Thread(target=lambda: httpx.post(served.url + COMPLETIONS, json=chat("a"), timeout=30))
        asking.start()
        support.eventually(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200
        release.set()
        asking.join()
        support.eventually(lambda: client.get("/ready").status_code == 200)


@pytest.mark.usefixtures("impatient")
def test_ready_is_503_while_a_canary_gets_no_answer() -> None:
    release = threading.Event()
    with (
        serving(engine(FaultyRunner(before=lambda: release.wait(30)))) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        time.sleep(0.2)
        support.eventually(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200
        release.set()
        support.eventually(lambda: client.get("/ready").status_code == 200)
