"""RunPod's queue as a server that can be asked: each request is a job, and its answer the job's output."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2 as httpx

from serve.errors import ConfigError, ServeError
from trimaran.verify.target import runpod_queue

FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
POLL_S = 0.2


def queue_of(url: str) -> str | None:
    """The address of the endpoint, if ``url`` is one of RunPod's queue: ``https://api.runpod.ai/v2/ENDPOINT``."""
    found = runpod_queue(url)
    return found.removesuffix("/openai") if found else None


def ask(client: httpx.Client, queue: str, route: str, timeout_s: float) -> Any:
    """What the worker answers to ``GET route``; waits for a worker to boot.

    Raises:
        ConfigError: the key is refused, there is no such endpoint, or its worker is not one of ours.
        ServeError: no answer in time, or RunPod failed.
    """
    deadline = time.monotonic() + timeout_s
    job = _call(client, "POST", f"{queue}/run", {"input": {"route": route, "method": "GET"}})
    while job.get("status") not in FINAL:
        if time.monotonic() > deadline:
            _call(client, "POST", f"{queue}/cancel/{job['id']}", None)
            raise ServeError(
                f"no worker answered in {timeout_s:.0f} s; the job is {job.get('status')} and was cancelled"
            )
        time.sleep(POLL_S)
        job = _call(client, "GET", f"{queue}/status/{job['id']}", None)
    if job["status"] != "COMPLETED":
        raise ConfigError(f"the job ended as {job['status']}: {_why(job)}; is the worker one of Trimaran's?")
    output = job.get("output")
    return output[0] if isinstance(output, list) and len(output) == 1 else output  # pyright: ignore


def _call(client: httpx.Client, method: str, url: str, body: Any) -> dict[str, Any]:
    try:
        response = client.request(method, url, json=body, timeout=30)
        if response.status_code in (401, 403):
            raise ConfigError(f"RunPod answers {response.status_code}: give --key, or set RUNPOD_API_KEY")
        if response.status_code == 404:
            raise ConfigError(f"{url} answers 404: is the endpoint's id right?")
        if response.is_error:
            raise ServeError(f"{url} answers {response.status_code}: {response.text[:200]}")
        job: Any = response.json()
        _ = job["id"], job["status"]
    except httpx.HTTPError as error:
        raise ServeError(f"{url} does not answer: {type(error).__name__}") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{url} answers no job; is this RunPod's queue?") from None
    return job


def _why(job: dict[str, Any]) -> str:
    said = str(job.get("error") or "no reason given")
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return said[:200]
