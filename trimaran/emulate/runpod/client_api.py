"""The side of the control plane that callers talk to: run, runsync, status, stream, cancel, retry, health, openai."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from trimaran.emulate.runpod.jobs import Board, Job, Status, new_job
from trimaran.emulate.runpod.worker_api import unless_gone

MAX_RUN_BYTES, MAX_RUNSYNC_BYTES = 10_000_000, 20_000_000
STREAM_HOLD_S = 5.0
"""RunPod's own client gives a status request up after 10 s."""

OPENAI_WAIT_S = 300.0


class ClientApi:
    """The routes of one endpoint."""

    def __init__(self, board: Board) -> None:
        self._board = board

    async def run(self, request: Request) -> Response:
        """Queue a job."""
        job = await self._submit(request, MAX_RUN_BYTES, is_sync=False)
        return job if isinstance(job, Response) else JSONResponse({"id": job.id, "status": job.status.value})

    async def runsync(self, request: Request) -> Response:
        """Queue a job and wait for its end, ``wait`` milliseconds at most."""
        try:
            wait_ms = float(request.query_params.get("wait", 90_000))
        except ValueError:
            return _refuse(400, "wait must be milliseconds")
        job = await self._submit(request, MAX_RUNSYNC_BYTES, is_sync=True)
        if isinstance(job, Response):
            return job
        await self._board.wait_until(lambda: job.status.is_final, min(max(wait_ms, 1000), 300_000) / 1000)
        return JSONResponse(job.view())

    async def _submit(self, request: Request, limit: int, *, is_sync: bool) -> Job | Response:
        raw = await request.body()
        if len(raw) > limit:
            return _refuse(413, f"the payload has {len(raw)} bytes, of at most {limit}")
        try:
            body = json.loads(raw)
        except ValueError:
            return _refuse(400, "the body is not JSON")
        if not isinstance(body, dict) or "input" not in body:
            return _refuse(400, "input is missing")
        job = new_job(body, is_sync=is_sync)  # pyright: ignore[reportUnknownArgumentType]
        self._board.add(job)
        return job

    async def status(self, request: Request) -> Response:
        """A job as it is now."""
        job = self._board.jobs.get(request.path_params["job"])
        return _refuse(404, "no such job") if job is None else JSONResponse(job.view())

    async def stream(self, request: Request) -> Response:
        """What was streamed since the last call; waits a little for something new."""
        job = self._board.jobs.get(request.path_params["job"])
        if job is None:
            return _refuse(404, "no such job")
        await self._board.wait_until(lambda: len(job.chunks) > job.num_read or job.status.is_final, STREAM_HOLD_S)
        chunks = self._board.unread(job)
        view: dict[str, Any] = {"status": job.status.value, "stream": [{"output": chunk} for chunk in chunks]}
        if job.error is not None:
            view["error"] = job.error
        return JSONResponse(view)

    async def cancel(self, request: Request) -> Response:
        """Stop a job."""
        job = self._board.jobs.get(request.path_params["job"])
        if job is None:
            return _refuse(404, "no such job")
        self._board.stop(job, Status.CANCELLED)
        return JSONResponse({"id": job.id, "status": job.status.value})

    async def retry(self, request: Request) -> Response:
        """Queue a failed job again."""
        job = self._board.jobs.get(request.path_params["job"])
        if job is None or job.status not in {Status.FAILED, Status.TIMED_OUT}:
            return _refuse(404 if job is None else 400, "only a failed job can be retried")
        again = Job(id=job.id, input=job.input, execution_s=job.execution_s, ttl_s=job.ttl_s)
        self._board.add(again)
        return JSONResponse({"id": again.id, "status": again.status.value})

    async def health(self, request: Request) -> Response:
        """Jobs and workers, counted."""
        del request
        return JSONResponse(self._board.counts())

    async def purge(self, request: Request) -> Response:
        """Cancel what waits."""
        del request
        return JSONResponse({"removed": self._board.purge(), "status": "completed"})

    async def openai(self, request: Request) -> Response:
        """An OpenAI request as a job: its output, or its stream as an event stream."""
        raw = await request.body()
        given: dict[str, Any] = {"openai_route": "/" + request.path_params["path"]}
        if request.url.query:
            given["openai_route"] += f"?{request.url.query}"
        if request.method not in {"GET", "POST"}:
            given["method"] = request.method
        if raw:
            try:
                given["openai_input"] = json.loads(raw)
            except ValueError:
                return _refuse(400, "the body is not JSON")
        job = new_job({"input": given}, is_sync=True)
        self._board.add(job)
        body = given.get("openai_input")
        if isinstance(body, dict) and body.get("stream") is True:  # pyright: ignore[reportUnknownMemberType]
            return await self._relay(request, job)
        if not await unless_gone(request, lambda: self._board.wait_until(lambda: job.status.is_final, OPENAI_WAIT_S)):
            self._board.stop(job, Status.CANCELLED)
            return _refuse(504, "the job did not end in time")
        if job.status is not Status.COMPLETED:
            return failed_answer(job)
        output = job.output
        single: Any = output[0] if isinstance(output, list) and len(output) == 1 else output  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return JSONResponse(single)

    async def _relay(self, request: Request, job: Job) -> Response:
        def has_news() -> bool:
            return bool(job.chunks) or job.status.is_final

        await unless_gone(request, lambda: self._board.wait_until(has_news, OPENAI_WAIT_S))
        if not job.chunks and job.status.is_final:
            return failed_answer(job)
        return StreamingResponse(self._events(job), media_type="text/event-stream")

    async def _events(self, job: Job) -> AsyncIterator[str]:
        attempt = job.attempts
        try:
            while True:
                await self._board.wait_until(
                    lambda: len(job.chunks) > job.num_read or job.status.is_final or job.attempts != attempt,
                    OPENAI_WAIT_S,
                )
                if job.attempts != attempt:
                    yield _event({"error": {"message": "the worker died in the middle of the answer"}})
                    self._board.stop(job, Status.CANCELLED)
                    return
                for chunk in self._board.unread(job):
                    yield chunk if isinstance(chunk, str) else _event(chunk)
                if job.status.is_final and len(job.chunks) == job.num_read:
                    return
        finally:
            if not job.status.is_final:  # the client has left
                self._board.stop(job, Status.CANCELLED)


def failed_answer(job: Job) -> Response:
    """A failed job as an HTTP answer.

    What RunPod's gateway does here is not documented.  A JSON error that names its ``status`` is taken at its word, any
    other error is a 500.
    """
    try:
        error: Any = json.loads(job.error)
        return JSONResponse({"error": error["error"]}, error["status"])
    except (TypeError, ValueError, KeyError):
        return JSONResponse({"error": job.error or f"the job ended as {job.status.value}"}, 500)


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _refuse(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
