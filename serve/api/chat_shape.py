"""A chat completion's events to its wire: one reading of each choice, sent as chunks or folded into the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_json

from serve.api.heading import Heading
from serve.api.logprobs import TokenBytes, chat_logprobs
from serve.api.sampling import UsageSum
from serve.api.schemas.chat import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprob,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
)
from serve.api.sse import DONE, TEXT, Shape, frame
from serve.types import TokenEvent

WireFinish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to its choice, as the wire tells it."""

    content: str = ""
    logprobs: tuple[ChatLogprob, ...] = ()
    finish_reason: WireFinish | None = None


class ChatReader:
    """Reads one choice's events, for the stream and for the whole answer alike.

    Args:
        token_bytes: For log-probabilities, where they were asked for.
    """

    def __init__(self, token_bytes: TokenBytes | None) -> None:
        self._token_bytes = token_bytes

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self._token_bytes is not None

    def read(self, event: TokenEvent) -> Piece:
        """The next piece of the choice."""
        logprobs = tuple(chat_logprobs(event.logprobs, self._token_bytes)) if self._token_bytes else ()
        finish_reason: Any = event.finish_reason.value if event.finish_reason else None
        return Piece(event.text, logprobs, finish_reason)


class ChatAnswer:
    """The fold: all pieces of every choice, joined."""

    def __init__(self, heading: Heading, readers: Sequence[ChatReader]) -> None:
        self._heading = heading
        self._readers = readers
        self._pieces: list[list[Piece]] = [[] for _ in readers]
        self._usage = UsageSum(len(readers))

    def add(self, index: int, event: TokenEvent) -> None:
        """Take the next event of a choice."""
        self._pieces[index].append(self._readers[index].read(event))
        if event.usage is not None:
            self._usage.add(index, event.usage)

    def body(self) -> ChatCompletion:
        """The whole answer."""
        choices = [self._choice(index, pieces) for index, pieces in enumerate(self._pieces)]
        return ChatCompletion(**self._heading.fields(), choices=choices, usage=self._usage.total())

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Choice:
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        finish_reason = pieces[-1].finish_reason
        if finish_reason is None:
            raise RuntimeError(f"choice {index} ended without a finish reason")
        return Choice(
            index=index,
            message=AssistantMessage(content="".join(piece.content for piece in pieces)),
            logprobs=ChoiceLogprobs(content=logprobs) if self._readers[index].has_logprobs else None,
            finish_reason=finish_reason,
        )


class ChatShape(Shape):
    """Events to chunks.  The frame around a text is made once for each choice, since there is one for each token.

    Args:
        heading: Of the answer.
        readers: One for each choice.
        include_usage: Whether a chunk with the usage was asked for.
        frame: Wraps a chunk's JSON.
        end: The last frame.
    """

    def __init__(
        self,
        heading: Heading,
        readers: Sequence[ChatReader],
        *,
        include_usage: bool,
        frame: Callable[[bytes], bytes] = frame,
        end: bytes = DONE,
    ) -> None:
        self._frame = frame
        self._last = end
        self._base = heading.fields()
        self._readers = readers
        self._include_usage = include_usage
        self._around: list[tuple[bytes, bytes] | None] = [None] * len(readers)
        self._num_running = len(readers)
        self._usage = UsageSum(len(readers))

    def frames(self, index: int, event: TokenEvent) -> Iterable[bytes]:
        """For each choice role, text and finish reason; after the last the usage when asked for, and ``[DONE]``."""
        around = self._around[index]
        if around is None:
            around = self._around[index] = self._split(index)
            yield self._chunk(index, Delta(role="assistant", content=""))
        piece = self._readers[index].read(event)
        if piece.logprobs:
            yield self._chunk(index, Delta(content=piece.content), logprobs=piece.logprobs)
        elif piece.content:
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
            yield self._frame(to_json(ChatCompletionChunk(**self._base, choices=[], usage=self._usage.total())))
        yield self._last

    def _split(self, index: int) -> tuple[bytes, bytes]:
        before, _, after = self._chunk(index, Delta(content=TEXT)).partition(to_json(TEXT))
        return before, after

    def _chunk(
        self,
        index: int,
        delta: Delta,
        finish_reason: WireFinish | None = None,
        logprobs: Sequence[ChatLogprob] = (),
    ) -> bytes:
        choice = ChunkChoice(
            index=index,
            delta=delta,
            logprobs=ChoiceLogprobs(content=list(logprobs)) if logprobs else None,
            finish_reason=finish_reason,
        )
        chunk = ChatCompletionChunk(**self._base, choices=[choice])
        return self._frame(chunk.model_dump_json(exclude=None if self._include_usage else {"usage"}).encode())
