"""The step loop's signs of life."""

from __future__ import annotations

import time

import pytest

from serve.engine import pulse as pulse_module
from serve.engine.base import StepOutput
from serve.engine.pulse import Pulse
from serve.errors import GenerationFailed
from serve.watchdog import Stopwatch


def test_pulse_times_the_step_that_runs() -> None:
    pulse = Pulse()
    assert pulse.step_age_s == 0.0
    with pulse.step():
        time.sleep(0.02)
        assert pulse.step_age_s >= 0.02
    assert pulse.step_age_s == 0.0


def test_pulse_forgets_a_step_that_failed() -> None:
    pulse = Pulse()
    with pytest.raises(RuntimeError), pulse.step():
        raise RuntimeError
    assert pulse.step_age_s == 0.0


def test_pulse_counts_steps_without_one_finite_row() -> None:
    pulse = Pulse()
    for output in (
        StepOutput([None]),
        StepOutput([None, None], errors={1: GenerationFailed("a grammar's own")}),
        StepOutput([None], errors={0: GenerationFailed("a grammar's own")}),
        StepOutput([]),  # a step of partial prompts
    ):
        pulse.saw(output, range(len(output.token_ids)))
    assert pulse.num_bad_steps == 2
    pulse.saw(StepOutput([None, 5]), [0])  # nobody waits for the other row
    assert pulse.num_bad_steps == 3
    pulse.saw(StepOutput([None, 5]), [0, 1])
    assert pulse.num_bad_steps == 0


def test_pulse_tells_the_age_of_the_last_token() -> None:
    pulse = Pulse()
    time.sleep(0.02)
    assert pulse.token_age_s >= 0.02
    pulse.saw(StepOutput([None]), [0])
    assert pulse.token_age_s >= 0.02
    pulse.saw(StepOutput([0]), [0])
    assert pulse.token_age_s < 0.02


def test_pulse_tells_how_long_a_queue_takes_at_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse, now = Pulse(), 1000.0
    monkeypatch.setattr(pulse_module.time, "monotonic", lambda: now)
    assert pulse.queue_s(10) == pulse_module.UNKNOWN_QUEUE_S
    for _ in range(20):  # two a second
        pulse.finished()
        now += 0.5
    assert pulse.queue_s(10) == pytest.approx(5.0)
    assert pulse.queue_s(1) == 1.0
    assert pulse.queue_s(1000) == pulse_module.MAX_QUEUE_S
    now += 59  # what was long ago says nothing about now
    assert pulse.queue_s(10) == pulse_module.MAX_QUEUE_S
    now += 10
    assert pulse.queue_s(10) == pulse_module.UNKNOWN_QUEUE_S


def test_stopwatch_leaves_out_the_time_in_which_the_process_stood_still() -> None:
    """As when a container is frozen: afterwards the step is old and does not hang."""
    watch = Stopwatch()
    assert watch.running_s(0.0, 1.0, 0.0) == 0.0
    assert watch.running_s(0.5, 1.0, 0.0) == 0.5
    assert watch.running_s(101.5, 101.0, 100.0) == pytest.approx(1.5)
    assert watch.running_s(102.5, 1.0, 0.0) == pytest.approx(2.5)  # the same step, and what was lost stays lost
    assert watch.running_s(0.2, 100.0, 99.0) == 0.0  # another one, whose time cannot be told apart
    assert watch.running_s(1.2, 1.0, 0.0) == pytest.approx(1.0)
    assert watch.running_s(0.7, 1.0, 0.0) == 0.7
