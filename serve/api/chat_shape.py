"""A chat completion's events to its wire: one reading of each choice, sent as chunks or folded into the answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_json

from serve.api.sampling import UsageSum
from serve.api.schemas.chat import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
)
from serve.api.sse import DONE, frame
from serve.types import TokenEvent

WireFinish = Literal["stop", "length", "tool_calls"]

_TEXT = "\x00text"
"""Stands for a chunk's text while its frame is made once; no JSON string of ours holds a NUL otherwise."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to its choice, as the wire tells it."""

    content: str = ""
    finish_reason: WireFinish | None = None


class ChatChoice:
    """Reads one choice's events, for the stream and for the whole answer alike."""

    def read(self, event: TokenEvent) -> Piece:
        """The next piece of the choice."""
        finish_reason: Any = event.finish_reason.value if event.finish_reason else None
        return Piece(event.text, finish_reason)


@dataclass(frozen=True, slots=True)
class Heading:
    """What all chunks of an answer have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self) -> dict[str, Any]:
        """By their names on the wire."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class ChatAnswer:
    """The fold: all pieces of every choice, joined."""

    def __init__(self, heading: Heading, n: int) -> None:
        self._heading = heading
        self._choices = [ChatChoice() for _ in range(n)]
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._finish_reasons: list[WireFinish] = ["stop"] * n
        self._usage = UsageSum(n)

    def add(self, index: int, event: TokenEvent) -> None:
        """Take the next event of a choice."""
        piece = self._choices[index].read(event)
        self._texts[index].append(piece.content)
        if piece.finish_reason is not None:
            self._finish_reasons[index] = piece.finish_reason
        if event.usage is not None:
            self._usage.add(index, event.usage)

    def body(self) -> ChatCompletion:
        """The whole answer."""
        choices = [
            Choice(
                index=index,
                message=AssistantMessage(content="".join(text)),
                finish_reason=self._finish_reasons[index],
            )
            for index, text in enumerate(self._texts)
        ]
        return ChatCompletion(**self._heading.fields(), choices=choices, usage=self._usage.total())


class ChatShape:
    """Events to chunks.  The frame around a text is made once for each choice, since there is one for each token."""

    def __init__(self, heading: Heading, n: int, *, include_usage: bool) -> None:
        self._base = heading.fields()
        self._include_usage = include_usage
        self._choices = [ChatChoice() for _ in range(n)]
        self._around: list[tuple[bytes, bytes] | None] = [None] * n
        self._num_running = n
        self._usage = UsageSum(n)

    def frames(self, index: int, event: TokenEvent) -> Iterable[bytes]:
        """For each choice role, text and finish reason; after the last the usage when asked for, and ``[DONE]``."""
        around = self._around[index]
        if around is None:
            around = self._around[index] = self._split(index)
            yield self._chunk(index, Delta(role="assistant", content=""))
        piece = self._choices[index].read(event)
        if piece.content:
            yield around[0] + to_json(piece.content) + around[1]
        if piece.finish_reason is not None:
            yield self._chunk(index, Delta(), piece.finish_reason)
            if event.usage is not None:
                self._usage.add(index, event.usage)
            self._num_running -= 1
            if not self._num_running:
                yield from self._end()

    def _end(self) -> Iterable[bytes]:
        if self._include_usage:
            yield frame(to_json(ChatCompletionChunk(**self._base, choices=[], usage=self._usage.total())))
        yield DONE

    def _split(self, index: int) -> tuple[bytes, bytes]:
        before, _, after = self._chunk(index, Delta(content=_TEXT)).partition(to_json(_TEXT))
        return before, after

    def _chunk(self, index: int, delta: Delta, finish_reason: WireFinish | None = None) -> bytes:
        choice = ChunkChoice(index=index, delta=delta, finish_reason=finish_reason)
        chunk = ChatCompletionChunk(**self._base, choices=[choice])
        return frame(chunk.model_dump_json(exclude=None if self._include_usage else {"usage"}).encode())
