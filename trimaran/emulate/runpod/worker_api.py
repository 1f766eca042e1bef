"""The side of the control plane that workers talk to: take, stop, stream, done, ping."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from trimaran.emulate.runpod.jobs import Board, Job, Status

MAX_CHUNK_BYTES = 1_000_000
MAX_RESULT_BYTES, MAX_SYNC_RESULT_BYTES = 10_000_000, 20_000_000


class WorkerApi:
    """The routes; ``long_poll_s`` is how long take and stop are held open."""

    def __init__(self, board: Board, long_poll_s: float) -> None:
        self._board = board
        self._long_poll_s = long_poll_s

    async def take(self, request: Request) -> Response:
        """One job, or with ``batch_size`` a list of them; 204 when none came."""
        worker = request.path_params["worker"]
        self._saw(worker)
        num_jobs = int(request.query_params.get("batch_size", 1))
        if not await self._hold(request, self._board.has_waiting) or await request.is_disconnected():
            return Response(status_code=204)
        jobs: list[Any] = [{"id": job.id, "input": job.input} for job in self._board.take(worker, num_jobs)]
        if not jobs:  # another worker was quicker
            return Response(status_code=204)
        return JSONResponse(jobs if "job-take-batch" in request.url.path else jobs[0])

    async def stop(self, request: Request) -> Response:
        """The ids of jobs to stop; 204 when none came."""
        worker = request.path_params["worker"]
        if not await self._hold(request, lambda: self._board.has_stops(worker)):
            return Response(status_code=204)
        return JSONResponse({"jobsToStop": self._board.stops(worker)})

    async def stream(self, request: Request) -> Response:
        """One piece of output."""
        return await self._receive(request, MAX_CHUNK_BYTES, self._streamed)

    def _streamed(self, job: Job, data: dict[str, Any]) -> None:
        self._board.stream(job, data.get("output"))

    async def done(self, request: Request) -> Response:
        """The result, or the error."""
        is_sync = request.path_params["job"].startswith("sync-")
        return await self._receive(request, MAX_SYNC_RESULT_BYTES if is_sync else MAX_RESULT_BYTES, self._done)

    def _done(self, job: Job, data: dict[str, Any]) -> None:
        if data.get("status") == Status.IN_PROGRESS:  # a progress update
            job.output = data.get("output")
        elif "error" in data:
            self._board.finish(job, Status.FAILED, output=data.get("output"), error=data["error"])
        else:
            self._board.finish(job, Status.COMPLETED, output=data.get("output"))

    async def ping(self, request: Request) -> Response:
        """A sign of life."""
        self._saw(request.path_params["worker"])
        return JSONResponse({"status": "pong"})

    def _saw(self, worker: str) -> None:
        self._board.seen[worker] = time.monotonic()

    async def _receive(self, request: Request, limit: int, use: Callable[[Job, dict[str, Any]], None]) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:  # the job was cancelled while its worker was sending
            return Response(status_code=400)
        job = self._board.jobs.get(request.path_params["job"])
        if job is None:
            return JSONResponse({"error": "no such job"}, 404)
        if len(body) > limit:
            return JSONResponse({"error": f"{len(body)} bytes, of at most {limit}"}, 413)
        try:
            data = json.loads(body)
        except ValueError:
            return JSONResponse({"error": "the body is not JSON"}, 400)
        if job.worker == request.path_params["worker"]:  # else it was given to another worker since
            use(job, data)
        return JSONResponse({"status": "ok"})

    async def _hold(self, request: Request, condition: Callable[[], bool]) -> bool:
        """Wait for ``condition``; False at the end of the poll, or when the worker has left.

        A poll that outlived its worker would swallow the next job.
        """
        return await unless_gone(request, lambda: self._board.wait_until(condition, self._long_poll_s))


async def unless_gone(request: Request, wait: Callable[[], Awaitable[bool]]) -> bool:
    """What ``wait`` gives, or False as soon as the client has left."""
    result = False

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(leave)
        result = await wait()
        group.cancel_scope.cancel()
    return result
