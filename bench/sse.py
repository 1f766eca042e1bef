"""One streamed completion as its client sees it: bytes to events, events to an outcome."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


class EventReader:
    """Splits a byte stream into the data of server-sent events, wherever the network cuts it."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """Add bytes; return the data of every event that is complete now."""
        events: list[str] = []
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data).decode("utf-8", "replace"))
                self._data = []
        return events


@dataclass(slots=True)
class Outcome:
    """One request, folded from its events.  Times are seconds of :func:`time.perf_counter`."""

    sent_at: float
    text_times: list[float] = field(default_factory=list[float])
    """When each piece of text arrived."""
    text: list[str] = field(default_factory=list[str])
    ended_at: float | None = None
    finish_reason: str | None = None
    usage_tokens: int | None = None
    prompt_tokens: int | None = None
    is_done: bool = False
    """``[DONE]`` was seen."""
    error: str | None = None
    """What went wrong, in a word that can be counted."""
    detail: str = ""

    def take(self, data: str, now: float) -> None:
        """Fold one event in."""
        if data == "[DONE]":
            self.is_done = True
            return
        try:
            chunk: dict[str, Any] = json.loads(data)
            self._take_chunk(chunk, now)
        except (ValueError, TypeError, AttributeError):
            self.fail("bad_event", data)

    def _take_chunk(self, chunk: dict[str, Any], now: float) -> None:
        if error := chunk.get("error"):
            self.fail("stream_error", str(error))
        for choice in chunk.get("choices") or ():
            text = (choice.get("delta") or {}).get("content")
            if text:
                self.text.append(text)
                self.text_times.append(now)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if usage := chunk.get("usage"):
            self.usage_tokens = usage.get("completion_tokens")
            self.prompt_tokens = usage.get("prompt_tokens")

    def fail(self, kind: str, detail: str = "") -> None:
        """Note the first error; later ones are its consequences."""
        if self.error is None:
            self.error, self.detail = kind, detail[:300]

    def close(self, now: float) -> None:
        """The stream ended."""
        self.ended_at = now
        if not self.text_times:
            self.fail("no_text")
        elif self.finish_reason is None:
            self.fail("no_finish_reason")

    def num_tokens(self, max_tokens: int) -> int:
        """Completion tokens: as the server counted them, else from the limit it ran into, else pieces of text."""
        if self.usage_tokens is not None:
            return self.usage_tokens
        return max_tokens if self.finish_reason == "length" else len(self.text_times)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from sending to the first text."""
        return self.text_times[0] - self.sent_at if self.text_times else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between neighbouring pieces of text."""
        return [after - before for before, after in zip(self.text_times, self.text_times[1:], strict=False)]
