"""Models elsewhere: an OpenAI-compatible server, or RunPod's queue with our worker behind it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol, cast

import httpx2 as httpx

from serve.errors import UpstreamFailed

CONNECT_TIMEOUT_S = 10.0
COLD = frozenset({502, 503})
"""What platforms answer while no container is up; 504 is left out, since the model may be at work on it."""

_QUEUE = re.compile(r"/v2/[^/]+$")
_FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
_REFUSALS = (b'data: {"error"', b"event: error\n")
"""How the only piece of a stream begins that was refused."""

POLL_S, MAX_POLL_S = 0.2, 2.0


class Answer(Protocol):
    """A response whose body is read as it arrives."""

    status: int
    headers: Mapping[str, str]

    def chunks(self) -> AsyncIterator[bytes]:
        """The body, piece by piece, nothing held back.  Raises ``UpstreamFailed``."""
        ...

    async def close(self) -> None:
        """Let the remote know that nobody reads any more."""
        ...


class Upstream(Protocol):
    """Sends requests; each :class:`Answer` must be closed."""

    async def send(self, method: str, target: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """One request.

        Args:
            method: Of HTTP.
            target: Path and query.
            body: JSON; empty for none.
            headers: Sent along where there is a place for them.

        Raises:
            ConnectionError: nothing answers there (yet).
            UpstreamFailed: the connection broke.
        """
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


def connect(url: str, api_key: str, timeout_s: float) -> Upstream:
    """The client that fits ``url``: RunPod's queue ends in ``/v2/ENDPOINT``, anything else speaks OpenAI's protocol."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    client = httpx.AsyncClient(
        headers={**headers, "accept-encoding": "identity"},
        timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        follow_redirects=True,  # Modal answers long requests with 303 and another address of its own
    )
    return RunPodQueue(client, base) if _QUEUE.search(base) else OpenAiServer(client, base)


async def _request(client: httpx.AsyncClient, method: str, url: str, **options: Any) -> httpx.Response:
    try:
        return await client.send(client.build_request(method, url, **options), stream=True)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
    except httpx.TimeoutException as error:
        raise UpstreamFailed("the remote did not answer in time; raise SERVE_REMOTE_TIMEOUT_S or try again") from error
    except httpx.HTTPError as error:
        raise UpstreamFailed(f"the remote broke off: {type(error).__name__}") from error


class HttpAnswer:
    """A response of an HTTP server."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self._response = response

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes over the wire."""
        try:
            async for chunk in self._response.aiter_raw():
                yield chunk
        except httpx.HTTPError as error:
            raise UpstreamFailed(f"the remote broke off: {type(error).__name__}") from error

    async def close(self) -> None:
        """Close the connection unless the body was read to its end."""
        await self._response.aclose()


class OpenAiServer:
    """A server with OpenAI's routes."""

    def __init__(self, client: httpx.AsyncClient, base: str) -> None:
        self._client, self._base = client, base

    async def send(self, method: str, target: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Pass the body on as it is."""
        headers = {**headers, "content-type": "application/json"} if body else headers
        return HttpAnswer(await _request(self._client, method, self._base + target, content=body, headers=headers))

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class RunPodQueue:
    """Requests as jobs: submitted, polled, and cancelled when nobody waits any more."""

    def __init__(self, client: httpx.AsyncClient, base: str) -> None:
        self._client, self._base = client, base

    async def send(self, method: str, target: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Submit a job and wait for the first of its output; a job has no headers."""
        del headers
        given: dict[str, Any] = {"openai_route": target}
        if body:
            given["openai_input"] = json.loads(body)
        elif method != "GET":
            given["method"] = method
        response = await _request(self._client, "POST", f"{self._base}/run", json={"input": given})
        if response.status_code != 200:
            return HttpAnswer(response)
        job_id = str(json.loads(await response.aread())["id"])
        is_stream = bool(body) and given["openai_input"].get("stream") is True
        answer = JobAnswer(self, job_id, is_stream)
        try:
            await answer.begin()
        except BaseException:
            await asyncio.shield(answer.close())
            raise
        return answer

    async def call(self, method: str, path: str) -> dict[str, Any]:
        """One request of RunPod's own."""
        try:
            response = await self._client.request(method, f"{self._base}{path}")
            response.raise_for_status()
            return response.json()
        except httpx.HTTPError as error:
            raise UpstreamFailed(f"RunPod's queue broke off: {type(error).__name__}") from error

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


class JobAnswer:
    """A job's output as the response that it stands for."""

    def __init__(self, queue: RunPodQueue, job_id: str, is_stream: bool) -> None:
        self.status = 200
        self.headers: Mapping[str, str] = {"content-type": "text/event-stream" if is_stream else "application/json"}
        self._queue, self._id, self._is_stream = queue, job_id, is_stream
        self._pieces: list[bytes] = []
        self._is_final = self._has_begun = False

    async def begin(self) -> None:
        """Poll until something is there, however long the job waits for a worker."""
        rest_s = POLL_S
        await self._poll()
        while not self._is_final and (not self._pieces or self._is_refused()):
            await asyncio.sleep(rest_s)
            rest_s = min(rest_s * 1.5, MAX_POLL_S)
            await self._poll()
        self._has_begun = True

    def _is_refused(self) -> bool:
        """Whether the stream holds nothing but an error; the job is about to fail then, and tells the status."""
        return bool(self._pieces) and self._pieces[0].startswith(_REFUSALS)

    async def _poll(self) -> None:
        job = await self._queue.call("GET", f"/{'stream' if self._is_stream else 'status'}/{self._id}")
        self._is_final = job["status"] in _FINAL
        entries: list[dict[str, Any]] = (job.get("stream") or []) if self._is_stream else []
        self._pieces += [entry["output"].encode() for entry in entries if isinstance(entry["output"], str)]
        if self._is_final and job["status"] != "COMPLETED":
            self._fail(job)
        elif self._is_final and not self._is_stream:
            output: Any = job.get("output")
            if isinstance(output, list) and len(cast("list[Any]", output)) == 1:  # the pieces of a generator
                output = cast("list[Any]", output)[0]
            self._pieces.append(json.dumps(output).encode())

    def _fail(self, job: Mapping[str, Any]) -> None:
        """A failed job is an error answer, unless its stream has begun (then the stream itself tells)."""
        if self._has_begun or (self._pieces and not self._is_refused()):
            return
        try:
            body: dict[str, Any] = json.loads(str(job.get("error")))
            self.status = int(body.pop("status"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UpstreamFailed(f"the job ended as {job['status']}") from None
        self.headers = {"content-type": "application/json"}
        self._pieces = [json.dumps(body).encode()]

    async def chunks(self) -> AsyncIterator[bytes]:
        """Output as it comes."""
        while True:
            while self._pieces:
                yield self._pieces.pop(0)
            if self._is_final:
                return
            await self._poll()
            if not self._pieces and not self._is_final:
                await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Cancel the job unless it has ended."""
        if not self._is_final:
            self._is_final = True
            await self._queue.call("POST", f"/cancel/{self._id}")
