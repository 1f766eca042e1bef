"""A local RunPod for tests: the control plane on a real port, and real workers (the SDK's loop) as processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn
from support import eventually

from trimaran.emulate.runpod.plane import Plane

ROOT = Path(__file__).parents[1]
HANDLER = ROOT / "deploy" / "runpod" / "handler.py"
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}

SLOW = "from serve.engine.echo import EchoEngine\nEchoEngine.__init__.__kwdefaults__['step_s'] = {step_s}"
"""Python that runs first in a worker: each step of the echo engine takes a while."""


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker and what it has logged."""

    name: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self) -> None:
        eventually(lambda: "Taking jobs" in self.log or self.process.poll() is not None, timeout_s=40)
        assert self.process.poll() is None, self.log

    def exit_status(self, timeout_s: float = 20) -> int:
        return self.process.wait(timeout_s)

    def logged(self, job_id: str) -> dict[str, str]:
        """The fields of the request's log line, once it has ended."""
        found = re.search(rf"request_id={re.escape(job_id)} (.*)", self.log)
        return dict(field.split("=", 1) for field in found[1].split() if "=" in field) if found else {}


class LocalRunpod:
    """The control plane and its client side."""

    def __init__(self, plane: Plane, url: str) -> None:
        self.plane = plane
        self.url = url
        self.base = f"{url}/v2/{plane.endpoint}"
        self.client = httpx.Client(headers={"Authorization": f"Bearer {plane.key}"}, timeout=60)

    def post(self, path: str, body: Any = None) -> Any:
        return self.client.post(self.base + path, json=body).raise_for_status().json()

    def run(self, job_input: Any, **fields: Any) -> str:
        """Queue a job; return its id."""
        return self.post("/run", {"input": job_input, **fields})["id"]

    def runsync(self, job_input: Any) -> Any:
        """Run a job to its end."""
        return self.post("/runsync", {"input": job_input})

    def status(self, job_id: str) -> Any:
        return self.client.get(f"{self.base}/status/{job_id}").raise_for_status().json()

    def result(self, job_id: str, timeout_s: float = 30) -> Any:
        """A job when it has ended."""
        eventually(lambda: self.status(job_id)["status"] in FINAL, timeout_s)
        return self.status(job_id)

    def stream(self, job_id: str) -> tuple[list[Any], Any]:
        """Every streamed piece, and the last view."""
        pieces: list[Any] = []
        while True:
            view = self.client.get(f"{self.base}/stream/{job_id}").raise_for_status().json()
            pieces += [piece["output"] for piece in view["stream"]]
            if view["status"] in FINAL and not view["stream"]:
                return pieces, view

    def num_chunks(self, job_id: str) -> int:
        return len(self.plane.board.jobs[job_id].chunks)

    @contextmanager
    def worker(self, name: str, before: str = "", *, wait: bool = True, **environment: str) -> Iterator[WorkerProcess]:
        """A real worker with the echo engine, unless ``environment`` says otherwise.

        ``before`` is Python that runs first in the process.
        """
        environment = {
            "SERVE_ENGINE": "echo",
            "SERVE_LOG_FORMAT": "text",
            "PYTHONPATH": str(ROOT),
            **self.plane.worker_environment(self.url, name),
            **environment,
        }
        with worker_process(name, before, environment) as worker:
            if wait:
                worker.wait_until_ready()
            yield worker


@contextmanager
def worker_process(name: str, before: str, environment: dict[str, str]) -> Iterator[WorkerProcess]:
    """``deploy/runpod/handler.py`` as a process; what it started ends with it."""
    run = f"import runpy\n{before}\nrunpy.run_path({str(HANDLER)!r}, run_name='__main__')"
    command = ["-c", run] if before else [str(HANDLER)]
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder, "log")
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", *command],
                cwd=folder,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield WorkerProcess(name, process, log_file)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@contextmanager
def local_runpod(**options: Any) -> Iterator[LocalRunpod]:
    """A control plane on a free port, in a thread."""
    plane = Plane(**{"long_poll_s": 3.0, "dead_after_s": 4.0, **options})
    server = uvicorn.Server(uvicorn.Config(plane.app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        local = LocalRunpod(plane, f"http://127.0.0.1:{port}")
        with local.client:
            yield local
    finally:
        server.should_exit = True
        thread.join(10)


def openai_input(text: str, **fields: Any) -> dict[str, Any]:
    """A chat completion, as RunPod's OpenAI gateway hands it on."""
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}
    return {"openai_route": "/v1/chat/completions", "openai_input": body}
