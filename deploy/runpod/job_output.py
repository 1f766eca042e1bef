"""What a job answers: the app's response as the pieces that the SDK sends.

A stream becomes bare event-stream text, any other answer one value, a failure ``{"error": JSON text}``.  The native
shape gets numbered chunks of text instead.
"""

from __future__ import annotations

import base64
import codecs
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from asgi_bridge import Exchange
from job_input import JobRequest

from serve.api.errors import error_json, speaks_anthropic, status_of, status_of_body
from serve.errors import GenerationFailed, ServeError

CHUNK_BYTES = 512 * 1024
"""The most that one piece of a stream has as JSON; RunPod takes 1 MB."""

_WORST_ESCAPE = 6
"""Bytes that JSON may need for one character: ``\\u001f``."""

OPENING_EVENTS = frozenset(
    {"response.created", "response.queued", "response.in_progress", "response.output_item.added"}
    | {"response.content_part.added", "message_start", "content_block_start", "ping"}
)
"""Events that come before the first token and hold nothing that a reader waits for."""

MAX_OPENING_CHARACTERS = 16 * 1024

Piece = Any
"""A string, an object or another JSON value; a failure is the object ``{"error": text}``, alone and last."""


def failure(error: ServeError) -> dict[str, str]:
    """The failed job of an error of ours."""
    return _failure(json.loads(error_json(error)), status_of(error))


def _failure(body: dict[str, Any], status: int) -> dict[str, str]:
    # Text, since the SDK would turn an object into its Python repr.
    return {"error": json.dumps({**body, "status": status}, ensure_ascii=False)}


def is_failure(piece: Piece) -> bool:
    """Whether a piece ends the job as failed."""
    return isinstance(piece, dict) and piece.keys() == {"error"} and isinstance(piece["error"], str)


async def pieces(exchange: Exchange, request: JobRequest) -> AsyncIterator[Piece]:
    """All that the job sends, in order."""
    status, headers = await exchange.start()
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "text/event-stream":
        events = _native_events(exchange) if request.is_native else _events(exchange)
        async for piece in events:
            yield piece
        return
    body = b""
    while data := await exchange.read():
        body += data
    value = _value(body, media_type, status)
    if status < 400:
        yield native(value) if request.is_native else value
        return
    if not (isinstance(value, dict) and isinstance(value.get("error"), dict)):
        value = json.loads(error_json(GenerationFailed(f"the app answered {status}")))
    if request.is_stream and not request.is_native:
        yield _last_event(value, request.target)
    yield _failure(value, status)


def _last_event(error: dict[str, Any], target: str) -> str:
    """An error as the clients of a route read it in a stream."""
    data = f"data: {json.dumps(error, ensure_ascii=False)}\n\n"
    return f"event: error\n{data}" if speaks_anthropic(target.partition("?")[0]) else f"{data}data: [DONE]\n\n"


def _value(body: bytes, media_type: str, status: int) -> Any:
    if not body:
        return {"status": status}
    if media_type == "application/json" or media_type.endswith("+json"):
        return json.loads(body)
    try:
        return body.decode()
    except UnicodeDecodeError:
        return {"content_type": media_type, "base64": base64.b64encode(body).decode()}


async def _events(exchange: Exchange) -> AsyncIterator[Piece]:
    splitter = EventSplitter()
    async for text in _texts(exchange, splitter):
        yield text
    if failed := splitter.error():
        yield failed


async def _native_events(exchange: Exchange) -> AsyncIterator[Piece]:
    splitter, seq = EventSplitter(), 0
    async for text in _texts(exchange, splitter):
        if chunk := _native_chunk(list(_data(text))):
            yield {"seq": seq, **chunk}
            seq += 1
    if failed := splitter.error():
        yield failed


async def _texts(exchange: Exchange, splitter: EventSplitter) -> AsyncIterator[str]:
    while data := await exchange.read():
        for text in splitter.feed(data):
            yield text
    for text in splitter.end():
        yield text


class EventSplitter:
    """The bytes of an event stream in, pieces of text out: whole events, as many as fit.

    An event that does not fit alone is cut between two characters.  The pieces together are the stream.  Events that
    only open an answer wait for what follows them: sent alone, they would hold up the first token by one POST.
    """

    def __init__(self, max_bytes: int = CHUNK_BYTES) -> None:
        self._max_bytes = max_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._is_opening = True
        self._last: list[str] = []

    def feed(self, data: bytes) -> Iterator[str]:
        """The pieces that ``data`` completes."""
        text = self._rest + self._decoder.decode(data)
        end = text.rfind("\n\n") + 2 if "\n\n" in text else 0
        self._is_opening = self._is_opening and len(text) <= MAX_OPENING_CHARACTERS and _only_opens(text[:end])
        end = 0 if self._is_opening else end
        self._rest = text[end:]
        yield from self._split(text[:end])

    def end(self) -> Iterator[str]:
        """What is left when the stream has ended."""
        text, self._rest = self._rest + self._decoder.decode(b"", final=True), ""
        yield from self._split(text)

    def error(self) -> dict[str, str] | None:
        """The failed job, when one of the last events was an error."""
        for event in self._last:
            for data in _data(event):
                body: Any = data if isinstance(data.get("error"), dict) else data.get("response")
                if isinstance(body, dict) and isinstance(body.get("error"), dict):
                    return _failure({"error": body["error"]}, status_of_body(body["error"]))
        return None

    def _split(self, text: str) -> Iterator[str]:
        if not text:
            return
        events = [event + "\n\n" for event in text.split("\n\n")]
        events[-1] = events[-1][:-2]  # what followed the last end of an event
        events = [event for event in events if event]
        self._last = (self._last + events)[-2:]
        if len(text) * _WORST_ESCAPE <= self._max_bytes or _json_bytes(text) <= self._max_bytes:
            yield text
            return
        piece, size = "", 0
        for part in (part for event in events for part in self._cut(event)):
            part_size = _json_bytes(part)
            if piece and size + part_size > self._max_bytes:
                yield piece
                piece, size = "", 0
            piece, size = piece + part, size + part_size
        yield piece

    def _cut(self, event: str) -> Iterator[str]:
        if _json_bytes(event) <= self._max_bytes:
            yield event
            return
        step = max(1, self._max_bytes // _WORST_ESCAPE)
        for start in range(0, len(event), step):
            yield event[start : start + step]


def _json_bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _data(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that the events in ``text`` carry."""
    # Not splitlines(): U+2028 and its like are ordinary characters within a line.
    for line in text.split("\n"):
        if line.startswith("data: {"):
            try:
                yield json.loads(line.removeprefix("data: "))
            except ValueError:  # one piece of an event that was cut
                continue


def _only_opens(text: str) -> bool:
    events = [event for event in text.split("\n\n") if event]
    bodies = list(_data(text))
    return len(bodies) == len(events) and all(_opens(body) for body in bodies)  # a comment has no body


def _opens(body: dict[str, Any]) -> bool:
    choices = body.get("choices")
    if not choices:
        return body.get("type") in OPENING_EVENTS
    deltas: list[dict[str, Any]] = [choice.get("delta") or {"text": "?"} for choice in choices]
    is_empty = all(name == "role" or not value for delta in deltas for name, value in delta.items())
    return is_empty and not any(choice.get("finish_reason") for choice in choices)


def _native_chunk(events: list[dict[str, Any]]) -> dict[str, Any]:
    texts: dict[int, str] = {}
    chunk: dict[str, Any] = {}
    for event in events:
        for choice in event.get("choices") or []:
            text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
            if choice.get("finish_reason"):
                chunk["finish_reason"] = choice["finish_reason"]
        if event.get("usage"):
            chunk["usage"] = _native_usage(event["usage"])
    if not any(texts.values()) and not chunk:
        return {}
    return {**_native_texts([texts.get(index, "") for index in range(max(texts, default=0) + 1)]), **chunk}


def native(answer: dict[str, Any]) -> dict[str, Any]:
    """A whole completion in the native shape."""
    choices = answer["choices"]
    texts = [(choice.get("message") or {}).get("content") or choice.get("text") or "" for choice in choices]
    return {
        "seq": 0,
        **_native_texts(texts),
        "finish_reason": choices[0]["finish_reason"],
        "usage": _native_usage(answer["usage"]),
    }


def _native_texts(texts: list[str]) -> dict[str, Any]:
    """``text`` is the first choice's; ``choices`` is where clients of worker-vllm look."""
    return {"text": texts[0], "choices": [{"tokens": [text]} for text in texts]}


def _native_usage(usage: dict[str, Any]) -> dict[str, int]:
    return {"input": usage["prompt_tokens"], "output": usage["completion_tokens"]}
