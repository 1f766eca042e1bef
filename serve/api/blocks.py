"""An answer as blocks, one after the other: thoughts, text and calls, for the wires that tell it so.

The chat completion's reader reads the events; here its pieces become the openings, growth and closings of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from serve.api.chat_reader import ChatReader, Piece
from serve.api.schemas.chat import ChatLogprob
from serve.chat.output.parts import CallDelta
from serve.types import FinishReason, TokenEvent, Usage


class Kind(StrEnum):
    """What a block holds."""

    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"


class Change(Enum):
    """What an event does to a block."""

    OPENED = "opened"
    GREW = "grew"
    CLOSED = "closed"


@dataclass(slots=True)
class Block:
    """One part of the answer.  The text of a call is its arguments, as JSON."""

    index: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list[str])
    logprobs: list[ChatLogprob] = field(default_factory=list["ChatLogprob"])
    is_closed: bool = False

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class Growth:
    """One change of one block: ``text`` and ``logprobs`` are what was added."""

    change: Change
    block: Block
    text: str = ""
    logprobs: tuple[ChatLogprob, ...] = ()


class BlockReader:
    """Reads one answer's events; afterwards it holds the whole answer, and why it ended."""

    def __init__(self, reader: ChatReader) -> None:
        self._reader = reader
        self.blocks: list[Block] = []
        self.finish_reason: FinishReason | None = None
        self.stop: str | None = None
        self.usage: Usage | None = None

    @property
    def reasoning_tokens(self) -> int:
        """Generated tokens that were thoughts."""
        return self._reader.reasoning_tokens

    def read(self, event: TokenEvent) -> Iterator[Growth]:
        """What one event changes, in order.  The answer's last event closes its last block."""
        piece = self._reader.read(event)
        yield from self._take(piece)
        if piece.finish_reason is not None:
            self.finish_reason = FinishReason(piece.finish_reason)
            self.stop, self.usage = event.stop, event.usage
            yield from self._close()

    def _take(self, piece: Piece) -> Iterator[Growth]:
        logprobs = tuple(piece.logprobs)
        for part in piece.parts:
            if part.call is not None:
                yield from self._grow_call(part.call)
            elif part.reasoning:
                yield from self._grow(Kind.REASONING, part.reasoning)
            elif part.content:
                yield from self._grow(Kind.TEXT, part.content, logprobs)
                logprobs = ()
        if logprobs:  # of tokens whose text came before or is still to come
            yield from self._grow(Kind.TEXT, "", logprobs)

    def _grow_call(self, delta: CallDelta) -> Iterator[Growth]:
        if delta.name is not None:
            yield from self._open(Kind.CALL, delta.id or "", delta.name)
        if delta.arguments:
            yield from self._grow(Kind.CALL, delta.arguments)

    def _grow(self, kind: Kind, text: str, logprobs: tuple[ChatLogprob, ...] = ()) -> Iterator[Growth]:
        if not self.blocks or self.blocks[-1].kind is not kind or self.blocks[-1].is_closed:
            yield from self._open(kind)
        block = self.blocks[-1]
        block.texts.append(text)
        block.logprobs += logprobs
        yield Growth(Change.GREW, block, text, logprobs)

    def _open(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[Growth]:
        yield from self._close()
        self.blocks.append(Block(len(self.blocks), kind, call_id, name))
        yield Growth(Change.OPENED, self.blocks[-1])

    def _close(self) -> Iterator[Growth]:
        if self.blocks and not self.blocks[-1].is_closed:
            self.blocks[-1].is_closed = True
            yield Growth(Change.CLOSED, self.blocks[-1])
