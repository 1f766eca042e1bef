"""The RunPod worker against a local control plane: ``python -m bench.runpod``.

Real workers with the real SDK, and an echo engine whose step takes a fixed time, so that the ideal is known.  The
figures are ratios to that ideal, and the time from a cancel to the end of its request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp

from bench.figures import load_average, machine, percentile, table, write_section
from bench.processes import BenchError
from trimaran.emulate.runpod.faults import Fault
from trimaran.emulate.runpod.plane import Plane
from trimaran.emulate.server import serving

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "benchmarks.md"
HANDLER = REPOSITORY / "deploy" / "runpod" / "handler.py"
SLOW = "from serve.engine.echo import EchoEngine; EchoEngine.__init__.__kwdefaults__['step_s'] = {step_s}"
PLAIN = "import runpod.version; runpod.version.__version__ = '1.13.0'"
"""Makes the adapter fall back to the SDK's own scaler, as it does for a version that it was not tested with."""


class Queue:
    """A control plane and its client side."""

    def __init__(self, plane: Plane, url: str, session: aiohttp.ClientSession) -> None:
        self.plane = plane
        self.url = url
        self.base = f"{url}/v2/{plane.endpoint}"
        self._session = session

    async def post(self, path: str, body: Any = None) -> Any:
        """One request to the client side."""
        async with self._session.post(self.base + path, json=body) as response:
            return await response.json()

    async def run(self, num_tokens: int, *, is_stream: bool = False) -> str:
        """Queue a job; return its id."""
        messages = [{"role": "user", "content": "x" * num_tokens}]
        body = {"model": "echo", "messages": messages, "max_tokens": num_tokens, "stream": is_stream}
        job_input = {"openai_route": "/v1/chat/completions", "openai_input": body}
        return (await self.post("/run", {"input": job_input}))["id"]

    async def ended(self, job_id: str) -> None:
        """Wait for a job's end.

        Raises:
            BenchError: it was not completed.
        """
        job = self.plane.board.jobs[job_id]
        await self.plane.board.wait_until(lambda: job.status.is_final, 120)
        if job.status != "COMPLETED":
            raise BenchError(f"a job ended as {job.status}: {job.error}")


@asynccontextmanager
async def queue() -> AsyncGenerator[Queue]:
    """A control plane on loopback."""
    plane = Plane(long_poll_s=5.0)
    headers = {"Authorization": f"Bearer {plane.key}"}
    async with serving(plane.app, 0) as url, aiohttp.ClientSession(headers=headers) as session:
        yield Queue(plane, url, session)


@contextmanager
def process(local: Queue, before: str, num_slots: int) -> Generator[Path]:
    """A worker; gives its log."""
    environment = {
        **os.environ,
        **local.plane.worker_environment(local.url, f"bench-{time.monotonic_ns()}"),
        "SERVE_ENGINE": "echo",
        "SERVE_MAX_BATCH_SIZE": str(num_slots),
        "SERVE_LOG_FORMAT": "json",
        "PYTHONPATH": str(REPOSITORY),
    }
    code = f"import runpy\n{before}\nrunpy.run_path({str(HANDLER)!r}, run_name='__main__')"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as file:
            command = [sys.executable, "-u", "-c", code]
            started = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            yield log
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


@asynccontextmanager
async def worker(local: Queue, before: str, num_slots: int) -> AsyncGenerator[Path]:
    """A worker that has answered once; gives its log."""
    with process(local, before, num_slots) as log:
        await local.ended(await local.run(1))
        yield log


def ends_of_aborted(log: Path) -> dict[str, float]:
    """When each request that was broken off ended, by its id."""
    # The SDK prints to the same file, and its lines and ours may share one.
    texts = log.read_text(encoding="utf-8").split('{"time"')[1:]
    lines = [json.JSONDecoder().raw_decode('{"time"' + text)[0] for text in texts]
    ends = {line["request_id"]: line["time"] for line in lines if line.get("finish_reason") == "abort"}
    return {request_id: datetime.fromisoformat(at).timestamp() for request_id, at in ends.items()}


async def throughput(local: Queue, num_jobs: int, num_slots: int, step_s: float, num_tokens: int) -> float:
    """Time over ideal time of ``num_jobs`` jobs that wait at once."""
    began = time.monotonic()
    jobs = [await local.run(num_tokens) for _ in range(num_jobs)]
    await asyncio.gather(*(local.ended(job) for job in jobs))
    return (time.monotonic() - began) / (num_jobs / num_slots * num_tokens * step_s)


async def streamed(local: Queue, num_tokens: int, post_s: float) -> tuple[float, float, int]:
    """Seconds to the first and to the last piece of one stream whose POSTs take ``post_s``, and their number."""
    if post_s:
        local.plane.faults.add(Fault("job-stream", delay_s=post_s))
    began = time.monotonic()
    job = local.plane.board.jobs[await local.run(num_tokens, is_stream=True)]
    await local.plane.board.wait_until(lambda: bool(job.chunks), 60)
    first = time.monotonic() - began
    await local.plane.board.wait_until(lambda: bool(job.chunks) and "[DONE]" in job.chunks[-1], 60)
    last = time.monotonic() - began
    await local.ended(job.id)
    local.plane.faults.clear()
    return first, last, len(job.chunks)


async def cancels(local: Queue, log: Path, count: int, post_s: float) -> list[float]:
    """Seconds from each cancel to the end of its request in the app."""
    if post_s:
        local.plane.faults.add(Fault("job-stream", delay_s=post_s))
    draw, times = random.Random(1), dict[str, float]()  # noqa: S311 - moments, not secrets
    for _ in range(count):
        job_id = await local.run(2000, is_stream=True)
        job = local.plane.board.jobs[job_id]
        await local.plane.board.wait_until(lambda job=job: bool(job.chunks), 60)
        await asyncio.sleep(draw.uniform(0, 0.5))
        times[job_id] = time.time()
        await local.post(f"/cancel/{job_id}")
        await asyncio.sleep(0.3)
    local.plane.faults.clear()
    await asyncio.sleep(2)
    ends = ends_of_aborted(log)
    if missing := times.keys() - ends.keys():
        raise BenchError(f"{len(missing)} of {count} cancelled requests went on")
    return [ends[job] - cancelled for job, cancelled in times.items()]


async def measure() -> str:
    """All figures, as Markdown."""
    rows: list[list[str]] = []
    async with queue() as local:
        for name, before in (("the SDK's own scaler", PLAIN + "\n"), ("this adapter", "")):
            for num_slots, num_jobs in ((1, 8), (4, 24), (8, 48)):
                async with worker(local, before + SLOW.format(step_s=0.02), num_slots):
                    ratio = await throughput(local, num_jobs, num_slots, 0.02, 50)
                rows.append([f"{num_jobs} jobs of 1 s, {num_slots} slots, {name}", f"{ratio:.3f}"])
        jobs = table(["waiting at once", "time / ideal"], rows)
        rows = []
        async with worker(local, SLOW.format(step_s=0.02), 4) as log:
            for post_s in (0.0, 0.05, 0.2):
                first, last, num_posts = await streamed(local, 100, post_s)
                figures = [f"{first:.2f}", f"{last:.2f}", f"{last / 2:.2f}", str(num_posts)]
                rows.append([f"{round(post_s * 1000)} ms", *figures])
            streams = table(["a POST takes", "first, s", "last, s", "last / ideal", "POSTs"], rows)
            rows = []
            for post_s in (0.0, 0.2):
                times = await cancels(local, log, 20, post_s)
                figures = [f"{1000 * percentile(times, 50):.0f}", f"{1000 * max(times):.0f}"]
                rows.append([f"{round(post_s * 1000)} ms", *figures])
            stops = table(["a POST takes", "median, ms", "slowest of 20, ms"], rows)
    return f"{jobs}\n\n100 tokens at 20 ms, ideally 2 s:\n\n{streams}\n\nCancel to the end of the request:\n\n{stops}"


def main() -> None:
    """Measure and print; ``--write`` puts the figures into the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.runpod", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the section of {PAGE.relative_to(REPOSITORY)}")
    options = parser.parse_args()
    before, began = load_average(), time.monotonic()
    figures = asyncio.run(measure())
    seconds = round(time.monotonic() - began)
    head = f"{machine()}; load average before the run {before}, after it {load_average()}; {seconds} s."
    print(f"{head}\n\n{figures}")
    if options.write:
        write_section(PAGE, "runpod", f"{head}\n\n{figures}")


if __name__ == "__main__":
    main()
