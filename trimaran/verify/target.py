"""The server that is verified: plain requests, and streams with the time of each event."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httpx2 as httpx

from trimaran.progress import waiting

COMPLETIONS = "/v1/chat/completions"
DONE = "[DONE]"
RUNPOD_HOST = "api.runpod.ai"
TRIES, MAX_PAUSE_S = 3, 65.0
"""A request that limits refuse (429) is sent so often, when they ask for so short a pause: limits are no fault."""

QUEUE_PATH = re.compile(r"^/v2/([^/]+)(?:/(?:run|runsync|openai(?:/v1)?))?/?$")

Json = dict[str, Any]


@dataclass(slots=True)
class Stream:
    """One streamed answer, as it came.

    ``times_s`` are seconds from the request to each event with text, in step with ``pieces``.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    chunks: list[Json] = field(default_factory=list[Json])
    pieces: list[str] = field(default_factory=list[str])
    times_s: list[float] = field(default_factory=list[float])
    is_done: bool = False
    broken: str = ""
    """What in it could not be read."""
    total_s: float = 0.0

    @property
    def content_type(self) -> str:
        """As the answer says; empty where it does not."""
        return self.headers.get("content-type", "")

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.pieces)

    @property
    def finish_reason(self) -> str | None:
        """As the last chunk with a choice says."""
        reasons = [choice.get("finish_reason") for chunk in self.chunks for choice in chunk.get("choices") or ()]
        return reasons[-1] if reasons else None

    @property
    def usage(self) -> Json | None:
        """Of the chunk that has it."""
        return next((chunk["usage"] for chunk in reversed(self.chunks) if chunk.get("usage")), None)

    def take(self, data: str, at_s: float) -> None:
        """Read the data of one event."""
        if data == DONE:
            self.is_done = True
            return
        try:
            chunk: Any = json.loads(data)
            deltas: list[Json] = [choice.get("delta") or {} for choice in chunk.get("choices") or ()]
        except (ValueError, AttributeError, TypeError):
            self.broken = self.broken or f"an event is no chunk: {data[:80]!r}"
            return
        self.chunks.append(chunk)
        if text := "".join(delta.get("content") or "" for delta in deltas):
            self.pieces.append(text)
            self.times_s.append(at_s)


class Target:
    """A server's address with a key.

    Args:
        url: With or without ``/v1`` at its end; of RunPod's queue the native address too.
        key: Empty: none is sent.
        timeout_s: Of each request.
        headers: Sent with every request, such as a platform's own keys.
        key_header: Where the key goes: ``authorization`` or ``x-api-key``.
    """

    def __init__(
        self,
        url: str,
        key: str,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        *,
        key_header: str = "authorization",
    ) -> None:
        queue = runpod_queue(url)
        self.is_queue = queue is not None
        """Requests pass through RunPod's queue, which has statuses of its own, and for certain only OpenAI's routes."""
        self.url = queue or url.rstrip("/").removesuffix("/v1")
        self.key = key
        self.model = ""
        """Its id in the API, once it is known."""
        self.timeout_s = timeout_s
        self.is_runpod = (urlsplit(self.url).hostname or "").endswith(RUNPOD_HOST)
        self.edge = "RunPod" if self.is_queue or (self.is_runpod and key_header == "authorization") else ""
        """Who checks the key before the server sees a request, and refuses in its own words; empty: the server does."""
        self._headers = dict(headers or {})
        self._key_header = key_header
        # Redirects: Modal answers 303 when a request takes long.
        self._client = httpx.Client(base_url=self.url, timeout=timeout_s, follow_redirects=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def headers(self, key: str | None = None) -> dict[str, str]:
        """With another key instead of its own; empty: with none."""
        key = self.key if key is None else key
        sent = f"Bearer {key}" if self._key_header == "authorization" else key
        return self._headers | ({self._key_header: sent} if key else {})

    @property
    def ready_path(self) -> str:
        """What is 200 when the server can be asked."""
        return "/v1/models" if self.is_queue else "/ready"

    def ask(
        self, method: str, path: str, *, key: str | None = None, is_patient: bool = True, **options: Any
    ) -> httpx.Response:
        """One request.  Raises ``httpx.HTTPError`` when there is no answer.

        ``is_patient``: where limits refuse it for a moment, it is sent again.
        """
        headers = self.headers(key) | options.pop("headers", {})
        left = TRIES if is_patient else 1
        while True:
            answer = self._client.request(method, path, headers=headers, **options)
            left -= 1
            if not left or not _paused(answer.status_code, answer.headers):
                return answer

    def chat(self, prompt: str, max_tokens: int, **fields: Any) -> Json:
        """The body of a greedy request."""
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **fields}

    @contextmanager
    def streaming(
        self, body: Json, headers: Mapping[str, str] | None = None
    ) -> Generator[tuple[Stream, Iterator[None]]]:
        """A stream, and an iterator that takes one event each time; leaving early closes the connection."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        began = time.perf_counter()
        sent = self.headers() | dict(headers or {})
        with self._client.stream("POST", COMPLETIONS, json=body, headers=sent) as answer:
            stream = Stream(answer.status_code, answer.headers)

            def events() -> Iterator[None]:
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        stream.take(line.removeprefix("data:").strip(), time.perf_counter() - began)
                        yield
                stream.total_s = time.perf_counter() - began

            yield stream, events()

    def stream(self, body: Json) -> Stream:
        """A whole streamed answer; where limits refuse it for a moment, it is asked for again."""
        left = TRIES
        while True:
            with self.streaming(body) as (stream, events):
                for _ in events:
                    pass
            left -= 1
            if not left or not _paused(stream.status, stream.headers):
                return stream


def _paused(status: int, headers: Mapping[str, str]) -> bool:
    """Whether limits of requests a minute had put it off, and their time has passed now."""
    try:
        wait_s = float(headers.get("retry-after", "")) if status == 429 else MAX_PAUSE_S + 1
    except ValueError:  # none, or a date
        return False
    if wait_s > MAX_PAUSE_S:
        return False
    with waiting("The server's limits want a pause"):
        time.sleep(wait_s)
    return True


def runpod_queue(url: str) -> str | None:
    """OpenAI's side of the queue that ``url`` names, at RunPod or emulated here; None: it names another server."""
    parts = urlsplit(url)
    found = QUEUE_PATH.match(parts.path)
    host = parts.hostname or ""
    if found is None or not (host == RUNPOD_HOST or _is_this_machine(host)):
        return None
    return f"{parts.scheme}://{parts.netloc}/v2/{found[1]}/openai"


def nobody_there(url: str) -> str:
    """Why it is no use to wait for ``url``; empty: something listens, or a platform's address may be asleep."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not _is_this_machine(host):
        return ""
    port = parts.port or {"https": 443}.get(parts.scheme, 80)
    try:
        socket.create_connection((host, port), timeout=5).close()
    except TimeoutError:
        return ""
    except OSError:
        return (
            f"nothing listens on port {port} of this machine; start a server there: trimaran run MODEL --port {port}"
            " (give --wait SECONDS where one is just starting)"
        )
    return ""


def _is_this_machine(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def error_defect(answer: httpx.Response) -> str | None:
    """What is wrong with a refusal's body, which must be ``{"error": {message, type, param, code}}``."""
    try:
        body = cast("Json", answer.json())
        error = cast("Json", body["error"])
    except (ValueError, KeyError, TypeError):
        return f"its body is no error of OpenAI's: {answer.text[:80]!r}"
    missing = [name for name in ("message", "type", "code") if name not in error]
    return f"its error lacks {', '.join(missing)}" if missing else None
