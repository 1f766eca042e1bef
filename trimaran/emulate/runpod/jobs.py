"""Jobs, their queue and their workers, as RunPod's control plane keeps them.  Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

DEFAULT_EXECUTION_S, DEFAULT_TTL_S = 600.0, 86_400.0


class Status(StrEnum):
    """The states of a job."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def is_final(self) -> bool:
        """Whether nothing will happen to the job any more."""
        return self not in {Status.IN_QUEUE, Status.IN_PROGRESS}


@dataclass(slots=True)
class Job:
    """One job.  Times are of :func:`time.monotonic`."""

    id: str
    input: Any
    execution_s: float = DEFAULT_EXECUTION_S
    ttl_s: float = DEFAULT_TTL_S
    status: Status = Status.IN_QUEUE
    output: Any = None
    error: Any = None
    chunks: list[Any] = field(default_factory=list[Any])
    num_read: int = 0
    attempts: int = 0
    worker: str | None = None
    created_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    ended_at: float | None = None

    def view(self) -> dict[str, Any]:
        """What ``/status`` shows; milliseconds, as on RunPod's wire."""
        view: dict[str, Any] = {"id": self.id, "status": self.status.value}
        if self.started_at is not None:
            view |= {"delayTime": round(1000 * (self.started_at - self.created_at)), "workerId": self.worker}
            if self.ended_at is not None:
                view["executionTime"] = round(1000 * (self.ended_at - self.started_at))
        if self.output is not None:
            view["output"] = self.output
        if self.error is not None:
            view["error"] = self.error
        return view


def new_job(body: Mapping[str, Any], *, is_sync: bool) -> Job:
    """A job from a request's body, which has an ``input``."""
    policy: Mapping[str, Any] = body.get("policy") or {}
    return Job(
        id=f"{'sync-' if is_sync else ''}{uuid.uuid4()}-e1",
        input=body["input"],
        execution_s=policy.get("executionTimeout", 1000 * DEFAULT_EXECUTION_S) / 1000,
        ttl_s=policy.get("ttl", 1000 * DEFAULT_TTL_S) / 1000,
    )


class Board:
    """Everything that happens to jobs.  All methods run on one event loop.

    Args:
        dead_after_s: Seconds without a ping after which a worker is dead and its jobs go back into the queue.
        max_attempts: Workers that may die over one job.
    """

    def __init__(self, *, dead_after_s: float = 30.0, max_attempts: int = 2) -> None:
        self.dead_after_s = dead_after_s
        self.max_attempts = max_attempts
        self.jobs: dict[str, Job] = {}
        self.seen: dict[str, float] = {}
        self._queue: deque[Job] = deque()
        self._stops: dict[str, list[str]] = {}
        self._changed = asyncio.Event()

    def add(self, job: Job) -> None:
        """Queue a new job."""
        self.jobs[job.id] = job
        self._queue.append(job)
        self.notify()

    def take(self, worker: str, num_jobs: int) -> list[Job]:
        """Hand up to ``num_jobs`` waiting jobs to a worker."""
        taken: list[Job] = []
        while self._queue and len(taken) < num_jobs:
            job = self._queue.popleft()
            if not job.status.is_final:
                job.status, job.worker, job.started_at = Status.IN_PROGRESS, worker, time.monotonic()
                job.attempts += 1
                taken.append(job)
        if taken:
            self.notify()
        return taken

    def stops(self, worker: str) -> list[str]:
        """The jobs that a worker should stop; each is told once."""
        return self._stops.pop(worker, [])

    def finish(self, job: Job, status: Status, *, output: Any = None, error: Any = None) -> None:
        """End a job; later endings change nothing."""
        if not job.status.is_final:
            job.status, job.ended_at = status, time.monotonic()
            job.output = job.output if output is None else output
            job.error = job.error if error is None else error
            self.notify()

    def stop(self, job: Job, status: Status, error: str | None = None) -> None:
        """End a job from outside, and tell its worker."""
        if job.status is Status.IN_PROGRESS and job.worker is not None:
            self._stops.setdefault(job.worker, []).append(job.id)
        self.finish(job, status, error=error)

    def stream(self, job: Job, chunk: Any) -> None:
        """A piece of output came."""
        if not job.status.is_final:
            job.chunks.append(chunk)
            self.notify()

    def unread(self, job: Job) -> list[Any]:
        """The pieces that were not read yet; each is given once."""
        new, job.num_read = job.chunks[job.num_read :], len(job.chunks)
        return new

    def purge(self) -> int:
        """Cancel what waits; return how many."""
        waiting = [job for job in self._queue if not job.status.is_final]
        self._queue.clear()
        for job in waiting:
            self.finish(job, Status.CANCELLED)
        return len(waiting)

    def lost(self, worker: str) -> None:
        """A worker died: its jobs go to the front of the queue, or fail after too many attempts."""
        self.seen.pop(worker, None)
        for job in [job for job in self.jobs.values() if job.status is Status.IN_PROGRESS and job.worker == worker]:
            if job.attempts >= self.max_attempts:
                self.finish(job, Status.FAILED, error=f"{job.attempts} workers died over this job")
            else:
                job.status, job.chunks, job.num_read = Status.IN_QUEUE, [], 0
                self._queue.appendleft(job)
        self.notify()

    def sweep(self) -> None:
        """What time alone brings about: dead workers, execution timeouts, jobs that waited too long."""
        now = time.monotonic()
        for worker, seen_at in list(self.seen.items()):
            if now - seen_at > self.dead_after_s:
                self.lost(worker)
        for job in list(self.jobs.values()):
            if job.status is Status.IN_PROGRESS and now - (job.started_at or now) > job.execution_s:
                self.stop(job, Status.TIMED_OUT, "executionTimeout exceeded")
            elif job.status is Status.IN_QUEUE and now - job.created_at > job.ttl_s:
                self.finish(job, Status.TIMED_OUT, error="ttl exceeded")

    def counts(self) -> dict[str, Any]:
        """What ``/health`` shows."""
        states = [job.status for job in self.jobs.values()]
        busy = {job.worker for job in self.jobs.values() if job.status is Status.IN_PROGRESS}
        return {
            "jobs": {
                "completed": states.count(Status.COMPLETED),
                "failed": states.count(Status.FAILED) + states.count(Status.TIMED_OUT),
                "inProgress": states.count(Status.IN_PROGRESS),
                "inQueue": states.count(Status.IN_QUEUE),
                "retried": sum(max(0, job.attempts - 1) for job in self.jobs.values()),
            },
            "workers": {"idle": len(self.seen.keys() - busy), "running": len(busy), "throttled": 0},
        }

    def notify(self) -> None:
        """Something changed: let everyone who waits look."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for ``condition``; return whether it holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                return condition()
        return True

    def has_waiting(self) -> bool:
        """Whether any job waits for a worker."""
        return any(not job.status.is_final for job in self._queue)

    def has_stops(self, worker: str) -> bool:
        """Whether a worker should stop a job."""
        return bool(self._stops.get(worker))
