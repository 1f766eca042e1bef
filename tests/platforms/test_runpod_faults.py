"""Bad days: cancelled jobs, refused POSTs, killed workers, signals, dead engines."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from runpod_local import SLOW, LocalRunpod, WorkerProcess, local_runpod, openai_input
from support import eventually, joined, openai_error, sse_chunks

from trimaran.emulate.runpod.faults import parse_fault

LONG = "x" * 2000
SlowQueue = tuple[LocalRunpod, WorkerProcess]


@pytest.fixture(autouse=True)
def _no_faults_left(request: pytest.FixtureRequest) -> Any:
    yield
    for name in ("runpod", "slow"):
        if name in request.fixturenames:
            found = request.getfixturevalue(name)
            (found[0] if isinstance(found, tuple) else found).plane.faults.clear()


def started(local: LocalRunpod, job_id: str, num_chunks: int = 2) -> None:
    eventually(lambda: local.num_chunks(job_id) >= num_chunks)


def test_cancel_ends_the_request_and_frees_the_slot(slow: SlowQueue):
    local, worker = slow
    for _ in range(2):  # both slots, twice over
        jobs = [local.run(openai_input(LONG, stream=True)) for _ in range(2)]
        for job in jobs:
            started(local, job)
            assert local.post(f"/cancel/{job}")["status"] == "CANCELLED"
        for job in jobs:
            eventually(lambda job=job: worker.logged(job).get("finish_reason") == "abort", 3)
    assert local.runsync(openai_input("hi"))["output"][0]["choices"][0]["message"]["content"] == "hi"


def test_cancel_reaches_the_engine_at_any_moment(slow: SlowQueue):
    """Also while the SDK is busy sending a piece, and for answers that are no stream."""
    local, worker = slow
    draw = random.Random(7)
    local.plane.faults.add(parse_fault("job-stream:0.05s"))
    for number in range(12):
        job = local.run(openai_input(LONG, stream=number % 4 != 3))
        eventually(lambda job=job: local.status(job)["status"] == "IN_PROGRESS")
        time.sleep(draw.uniform(0.02, 0.3))
        local.post(f"/cancel/{job}")
        eventually(lambda job=job: worker.logged(job).get("total_ms") is not None, 3)
        assert worker.logged(job).get("finish_reason", "abort") == "abort"


def test_execution_timeout_ends_the_request(slow: SlowQueue):
    local, worker = slow
    job = local.run(openai_input(LONG, stream=True), policy={"executionTimeout": 300})
    assert local.result(job)["status"] == "TIMED_OUT"
    eventually(lambda: worker.logged(job).get("finish_reason") == "abort", 3)


def test_jobs_run_in_every_slot_and_no_more(slow: SlowQueue):
    local, worker = slow
    jobs = [local.run(openai_input("y" * 20)) for _ in range(6)]
    for job in jobs:
        assert local.result(job)["output"][0]["choices"][0]["message"]["content"] == "y" * 20
    fields = [worker.logged(job) for job in jobs]
    # A job that was taken without a free slot would wait in the engine for the 0.4 s of another.
    assert max(float(field["queue_ms"]) for field in fields) < 200, fields
    assert {local.plane.board.jobs[job].worker for job in jobs} == {"slow"}


def test_an_answer_on_its_way_holds_no_slot(runpod: LocalRunpod):
    """Twelve quick jobs in four slots, each delivered in two POSTs of 0.3 s."""
    for route in ("job-stream", "job-done"):
        runpod.plane.faults.add(parse_fault(f"{route}:0.3s"))
    began = time.monotonic()
    jobs = [runpod.run(openai_input("y")) for _ in range(12)]
    for job in jobs:
        assert runpod.result(job)["status"] == "COMPLETED"
    assert time.monotonic() - began < 1.7, "three rounds of 0.6 s, one after the other, take 1.8 s"


@pytest.mark.parametrize("fault", ["job-stream:500x2", "job-stream:503x4", "job-done:500x5", "job-take:500x3"])
def test_refused_requests_lose_nothing(runpod: LocalRunpod, fault):
    runpod.plane.faults.add(parse_fault(fault))
    job = runpod.run(openai_input("héllo 🎉 " * 9, stream=True))
    pieces, last = runpod.stream(job)
    assert last["status"] == "COMPLETED"
    assert joined(sse_chunks("".join(pieces))) == "héllo 🎉 " * 9
    assert runpod.status(job)["output"] == pieces


def test_a_piece_that_is_refused_for_good_leaves_the_result_whole(runpod: LocalRunpod):
    runpod.plane.faults.add(parse_fault("job-stream:413x1"))
    job = runpod.result(runpod.run(openai_input("hi", stream=True)))
    assert job["status"] == "COMPLETED"
    assert joined(sse_chunks("".join(job["output"]))) == "hi"


def test_eight_jobs_at_once_keep_their_answers_apart(runpod: LocalRunpod):
    texts = [f"{number} 🎉é " * 30 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        streams = list(pool.map(lambda text: runpod.stream(runpod.run(openai_input(text, stream=True)))[0], texts))
    assert [joined(sse_chunks("".join(pieces))) for pieces in streams] == texts


def test_a_killed_worker_is_replaced_and_the_answer_comes_once():
    """Only the main process is killed: a heartbeat that lived on would keep the job from ever being run again."""
    with local_runpod(dead_after_s=3.0) as local, local.worker("first", SLOW.format(step_s=0.02)) as first:
        numbered = {"messages": [{"role": "user", "content": "z" * 150}], "stream": True}
        job, native = local.run(openai_input("z" * 150)), local.run(numbered)
        started(local, native)
        first.process.send_signal(signal.SIGKILL)
        with local.worker("second"):
            answer = local.result(job)
            pieces, _ = local.stream(native)
            assert local.plane.board.jobs[job].attempts == 2
            assert (answer["status"], answer["workerId"]) == ("COMPLETED", "second")
            assert answer["output"][0]["choices"][0]["message"]["content"] == "z" * 150
            whole = pieces[max(at for at, piece in enumerate(pieces) if piece["seq"] == 0) :]
            assert "".join(piece["text"] for piece in whole) == "z" * 150


def test_sigterm_drains_and_leaves_later_jobs_to_others():
    with local_runpod(long_poll_s=20.0) as local:
        with local.worker("first", SLOW.format(step_s=0.02)) as first:
            job = local.run(openai_input("a" * 60))
            eventually(lambda: local.status(job)["status"] == "IN_PROGRESS")
            first.process.send_signal(signal.SIGTERM)
            eventually(lambda: "Draining" in first.log)
            late = local.run(openai_input("late"))
            assert local.result(job)["output"][0]["choices"][0]["message"]["content"] == "a" * 60
            assert first.exit_status() == 0, first.log
            assert local.status(late)["status"] == "IN_QUEUE"
        with local.worker("second", SERVE_RUNPOD_MODE="queue") as second:
            assert local.result(late)["workerId"] == "second"
            began = time.monotonic()
            second.process.send_signal(signal.SIGTERM)  # idle, under a poll of 20 s
            assert second.exit_status(5) == 0
            assert time.monotonic() - began < 5


def test_jobs_that_outlast_the_drain_are_told_so():
    with local_runpod() as local:
        with local.worker("w", SLOW.format(step_s=0.02), SERVE_DRAIN_TIMEOUT_S="0.2") as worker:
            job = local.run(openai_input(LONG, stream=True))
            started(local, job)
            worker.process.send_signal(signal.SIGTERM)
            assert worker.exit_status() == 0
        result = local.status(job)
        assert result["status"] == "FAILED"
        assert json.loads(result["error"])["error"]["code"] == "shutting_down"
        assert json.loads(result["error"])["status"] == 503


DYING = """
from serve.engine.echo import EchoRunner
step = EchoRunner.step
def dying(self, batch):
    if any(len(sequence.output_token_ids) == 5 for sequence in batch.sampled):
        raise RuntimeError("CUDA error: device-side assert triggered")
    return step(self, batch)
EchoRunner.step = dying
"""


def test_a_dead_engine_fails_its_jobs_and_ends_the_worker():
    with local_runpod() as local, local.worker("w", DYING) as worker:
        jobs = [local.run(openai_input("abcdefgh", stream=is_stream)) for is_stream in (True, False)]
        for job in jobs:
            error = json.loads(local.result(job)["error"])
            assert (openai_error({"error": error["error"]})["code"], error["status"]) == ("engine_dead", 503)
        assert worker.exit_status() == 70, worker.log


def test_nothing_of_a_prompt_is_logged(slow: SlowQueue):
    local, worker = slow
    local.runsync(openai_input("a very private question"))
    assert "private" not in worker.log


def group_members(group: int) -> list[str]:
    """The processes of a group that still run."""
    members: list[str] = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, fields = file.read_text().rpartition(")")
            state, _, its_group = fields.split()[:3]
            if int(its_group) == group and state != "Z":
                members.append(name)
    return members


def test_the_worker_is_its_own_first_process_and_leaves_none_behind():
    with local_runpod() as local, local.worker("w") as worker:
        group = os.getpgid(worker.process.pid)
        assert group == worker.process.pid
        eventually(lambda: len(group_members(group)) == 2)  # itself and the SDK's heartbeat
        worker.process.send_signal(signal.SIGTERM)
        assert worker.exit_status(5) == 0
        eventually(lambda: not group_members(group))
