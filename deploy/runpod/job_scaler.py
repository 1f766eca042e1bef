"""The SDK's job loop, corrected: for the versions of the SDK that it was tested with.

The SDK's own scaler counts a job twice and rests for a second when it is full, which costs half the throughput of
short jobs; it loses a chunk or a result that RunPod refuses three times, takes jobs after SIGTERM that it never runs,
and waits for its long poll to end.  Everything else (start, health checks, heartbeat, transport) stays the SDK's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import aclosing, suppress
from typing import Any

import aiohttp
from job_output import is_failure
from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules import rp_http, rp_job, rp_scale

from serve.api.errors import error_json
from serve.errors import RequestTooLarge

logger = logging.getLogger("serve.runpod")

MAX_RESULT_BYTES, MAX_SYNC_RESULT_BYTES = 10_000_000, 20_000_000
"""The largest result of ``/run`` and ``/runsync``."""

MAX_CHUNK_BYTES = 1_000_000
"""The largest piece that RunPod streams."""

IDLE_REST_S = 0.05
"""Between takes that bring nothing at once: a server that holds no long poll must not be hammered."""

MAX_JOBS_PER_SLOT = 2
"""One in the slot, one that is being delivered."""

MAX_REST_S, THROTTLED_REST_S = 5.0, 5.0
POST_TIMEOUT = aiohttp.ClientTimeout(total=60)
LAST_POSTS_S = 10.0
"""Seconds for the results of requests that the drain ended."""


class SlotScaler(rp_scale.JobScaler):
    """Takes a job whenever a slot is free, and only then.

    A slot is free when the app has answered; the answer may still be on its way to RunPod.  Of ``config`` it reads,
    besides what the SDK reads: ``num_slots``, ``drain_timeout_s``, ``delivery_timeout_s``; ``answered``, a list of what
    the handler calls when a job has left its slot; and ``end_requests``, called when the drain's time is over and
    requests still run.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.current_concurrency = config["num_slots"]
        self.jobs_handler = self._deliver
        self.jobs_queue = asyncio.Queue()  # stays empty; the SDK's handle_job marks an entry of it as done
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._in_slots: set[str] = set()
        config["answered"].append(self._left_slot)

    async def run(self) -> None:
        """The worker's life, on the SDK's loop."""
        self._loop = asyncio.get_running_loop()
        async with AsyncClientSession() as session:
            stops = asyncio.create_task(self.monitor_stop_signals(session))
            try:
                await self.get_jobs(session)
                await self._drain()
            finally:
                stops.cancel()

    def kill_worker(self) -> None:
        """Take no more jobs; called by the SDK's signal handler."""
        super().kill_worker()
        if self._loop is not None:  # the handler of a signal does not wake a waiting loop by itself
            self._loop.call_soon_threadsafe(self._changed.set)

    async def get_jobs(self, session: Any) -> None:
        """Keep the slots filled until the worker is told to end."""
        rest_s = IDLE_REST_S
        while self.is_alive():
            # Deliveries that do not get through must not pile up.
            room = MAX_JOBS_PER_SLOT * self.current_concurrency - len(self.jobs_tasks)
            free = min(self.current_concurrency - len(self._in_slots), room)
            if free <= 0:
                await self._wait_for_change(None)
                continue
            began = time.monotonic()
            try:
                jobs = await self._take(session, free)
                rest_s = IDLE_REST_S
            except TooManyRequests:
                await self._wait_for_shutdown(THROTTLED_REST_S)
                continue
            except Exception as error:
                logger.error("No job could be taken: %s: %s", type(error).__name__, error)
                await self._wait_for_shutdown(rest_s)
                rest_s = min(2 * rest_s, MAX_REST_S)
                continue
            for job in jobs:
                self._begin(session, job)
            if not jobs and time.monotonic() - began < IDLE_REST_S:
                await self._wait_for_shutdown(IDLE_REST_S)

    async def _take(self, session: Any, num_jobs: int) -> list[dict[str, Any]]:
        """One long poll, broken off at shutdown unless an answer is already coming in."""
        watched: Any = _WatchedSession(session)
        take = asyncio.ensure_future(self.jobs_fetcher(watched, num_jobs))
        shutdown = asyncio.ensure_future(self._wait_for_shutdown(self.jobs_fetcher_timeout))
        await asyncio.wait({take, shutdown}, return_when=asyncio.FIRST_COMPLETED)
        shutdown.cancel()
        if not take.done():
            await asyncio.wait({take}, timeout=IDLE_REST_S)  # what has arrived but was not read
            if watched.is_answered:
                await asyncio.wait({take}, timeout=MAX_REST_S)
        if not take.done():
            take.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await take
            return []
        return [job for job in take.result() or [] if self._is_new(job)]

    def _is_new(self, job: Any) -> bool:
        if not isinstance(job, dict) or not isinstance(job.get("id"), str):
            logger.error("A job without an id was taken; it is left out")
            return False
        if job["id"] in self.jobs_tasks:
            logger.warning("Job %s was handed over again; it is already running", job["id"])
            return False
        return True

    def _begin(self, session: Any, job: dict[str, Any]) -> None:
        self.job_progress.add(job["id"])
        self._in_slots.add(job["id"])
        self.jobs_queue.put_nowait(job)
        self.jobs_queue.get_nowait()
        task = asyncio.create_task(self.handle_job(session, job), name=job["id"])
        self.jobs_tasks[job["id"]] = task
        task.add_done_callback(self._ended)

    def _left_slot(self, job_id: str) -> None:
        self._in_slots.discard(job_id)
        self._changed.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._left_slot(task.get_name())
        self.jobs_tasks.pop(task.get_name(), None)  # a task that was cancelled before it began
        self.job_progress.remove(task.get_name())
        if not task.cancelled() and task.exception() is not None:
            logger.error("Job %s ended with %r", task.get_name(), task.exception())

    async def _wait_for_change(self, timeout_s: float | None) -> None:
        """Until a slot is free, a job ends or the worker is told to end."""
        self._changed.clear()
        if self.is_alive():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)

    async def _wait_for_shutdown(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.is_alive() and (left := deadline - time.monotonic()) > 0:
            await self._wait_for_change(left)

    async def _drain(self) -> None:
        """Let running jobs end; end those that take too long, and wait for their errors to be sent."""
        running = set(self.jobs_tasks.values())
        if not running:
            return
        logger.info("Draining %d jobs for at most %g s", len(running), self.config["drain_timeout_s"])
        _, late = await asyncio.wait(running, timeout=self.config["drain_timeout_s"])
        if late:
            await asyncio.to_thread(self.config["end_requests"])
            _, late = await asyncio.wait(late, timeout=LAST_POSTS_S)
        for task in late:
            task.cancel()

    async def monitor_stop_signals(self, session: Any) -> None:
        """Cancel jobs as RunPod asks, also while draining.

        The SDK rests for a second after every poll that brings nothing; here only a server that answers at once is
        given a rest.
        """
        if rp_job._job_stop_url() is None:
            logger.warning("RUNPOD_WEBHOOK_GET_JOB has no /job-take/: jobs cannot be cancelled")
            return
        error_rest_s = 0.5
        while True:
            began = time.monotonic()
            try:
                job_ids = await asyncio.wait_for(self.stop_signals_fetcher(session), self.stop_signals_fetcher_timeout)
                error_rest_s = 0.5
            except TooManyRequests:
                await asyncio.sleep(THROTTLED_REST_S)
                continue
            except TimeoutError:
                continue
            except Exception as error:
                logger.error("Stop signals cannot be read: %s: %s", type(error).__name__, error)
                await asyncio.sleep(error_rest_s)
                error_rest_s = min(2 * error_rest_s, 30.0)
                continue
            for job_id in job_ids:
                await self.stop_job(job_id)
            if not job_ids and time.monotonic() - began < 0.5:
                await asyncio.sleep(0.1)

    async def _deliver(self, session: Any, config: dict[str, Any], job: dict[str, Any]) -> None:
        """Run a job and send what it answers; nothing is sent for a job that is cancelled."""
        output: list[Any] = []
        result: dict[str, Any] = {"output": output}
        num_bytes = 0
        async with aclosing(config["handler"](job)) as pieces:
            async for piece in pieces:
                if is_failure(piece):
                    result = piece
                    break
                output.append(piece)
                data = _encode({"output": piece})
                num_bytes += len(data)
                if len(data) <= MAX_CHUNK_BYTES:  # a large answer that is no stream comes with the result only
                    await self._post(session, rp_http.JOB_STREAM_URL, job["id"], data, is_stream=False)
        limit = MAX_SYNC_RESULT_BYTES if job["id"].startswith("sync-") else MAX_RESULT_BYTES
        if num_bytes > limit and result.get("output") is output:
            result = _too_large(len(output) > 1, num_bytes, limit)
        await self._post(session, rp_http.JOB_DONE_URL, job["id"], _encode(result), is_stream=True)

    async def _post(self, session: Any, template: str, job_id: str, data: bytes, *, is_stream: bool) -> None:
        """POST until RunPod accepts it, in the SDK's form."""
        url = template.replace("$ID", job_id) + f"&isStream={str(is_stream).lower()}"
        headers = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded", "X-Request-ID": job_id}
        deadline, delay = time.monotonic() + self.config["delivery_timeout_s"], 0.1
        while True:
            try:
                async with session.post(url, data=data, headers=headers, timeout=POST_TIMEOUT) as response:
                    if response.status < 400:
                        return
                    reason, is_final = f"status {response.status}", response.status not in {408, 425, 429}
                    is_final = is_final and response.status < 500
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                reason, is_final = f"{type(error).__name__}: {error}", False
            if is_final or time.monotonic() + delay > deadline:
                logger.error("Part of the answer of job %s was not accepted: %s", job_id, reason)
                return
            logger.warning("Part of the answer of job %s is sent again: %s", job_id, reason)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_REST_S)


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _too_large(was_streamed: bool, num_bytes: int, limit: int) -> dict[str, Any]:
    size = f"the answer has {num_bytes} bytes, and RunPod keeps at most {limit} for a job"
    if was_streamed:
        return {"output": [{"notice": f"{size}: only /stream gave it"}]}
    error = RequestTooLarge(f"{size}; ask for less, stream it, or use SERVE_RUNPOD_MODE=http")
    return {"error": json.dumps({**json.loads(error_json(error)), "status": 413})}


class _WatchedSession:
    """The SDK's HTTP session; knows whether its one GET has been answered with something to read."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._response: Any = None
        self.is_answered = False

    def get(self, url: str) -> _WatchedSession:
        self._request = self._session.get(url)
        return self

    async def __aenter__(self) -> Any:
        response = await self._request.__aenter__()
        self.is_answered = response.status == 200
        return response

    async def __aexit__(self, *error: Any) -> None:
        await self._request.__aexit__(*error)


def install() -> None:
    """Make the SDK use this scaler."""
    rp_scale.JobScaler = SlotScaler
