"""A text completion's events to its wire: one reading of each choice, sent as chunks or folded into the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_json

from serve.api.heading import Heading
from serve.api.logprobs import TextLogprobs
from serve.api.sampling import UsageSum
from serve.api.schemas.completions import Completion, CompletionChoice, CompletionLogprobs
from serve.api.sse import DONE, TEXT, Shape, frame
from serve.types import TokenEvent, TokenLogprob, Usage

WireFinish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as an answer repeats it."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to its choice, as the wire tells it."""

    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: WireFinish | None
    usage: Usage | None


class CompletionReader:
    """Reads one choice's events, for the stream and for the whole answer alike.

    Args:
        echo: The prompt, to begin with.
        logprobs: Places the tokens in the text; None: they were not asked for.
        generates: False for ``max_tokens: 0``: the one token that the engine makes is left out.
    """

    def __init__(self, echo: Prompt | None, logprobs: TextLogprobs | None, *, generates: bool) -> None:
        self._echo = echo
        self._logprobs = logprobs
        self._generates = generates

    def read(self, event: TokenEvent) -> Piece:
        """The next piece of the choice."""
        echo, self._echo = self._echo, None
        text, finish_reason = echo.text if echo else "", event.finish_reason.value if event.finish_reason else None
        usage, entries = event.usage, self._entries(echo, event) if self._logprobs is not None else []
        if self._generates:
            text += event.text
        elif finish_reason and usage:
            finish_reason, usage = "length", Usage(usage.prompt_tokens, 0, usage.cached_tokens)
        logprobs = self._logprobs.read(text, entries) if self._logprobs is not None else None
        wire_finish: Any = finish_reason
        return Piece(text, logprobs, wire_finish, usage)

    def _entries(self, echo: Prompt | None, event: TokenEvent) -> list[tuple[int, TokenLogprob | None]]:
        found: list[tuple[int, TokenLogprob | None]] = []
        if echo is not None:
            found += zip(echo.token_ids, event.prompt_logprobs or (), strict=True)
        if self._generates:
            ended = (event.end_logprob,) if event.end_logprob is not None else ()
            found += [(entry.token_id, entry) for entry in (*event.logprobs, *ended)]
        return found


class CompletionAnswer:
    """The fold: all pieces of every choice, joined.

    Args:
        heading: Of the answer.
        readers: One for each choice.
        n: Choices for each prompt.
    """

    def __init__(self, heading: Heading, readers: Sequence[CompletionReader], n: int) -> None:
        self._heading = heading
        self._readers = readers
        self._pieces: list[list[Piece]] = [[] for _ in readers]
        self._usage = UsageSum(n)

    def add(self, index: int, event: TokenEvent) -> None:
        """Take the next event of a choice."""
        piece = self._readers[index].read(event)
        self._pieces[index].append(piece)
        if piece.usage is not None:
            self._usage.add(index, piece.usage)

    def body(self) -> Completion:
        """The whole answer."""
        choices = [
            CompletionChoice(
                index=index,
                text="".join(piece.text for piece in pieces),
                logprobs=_joined([piece.logprobs for piece in pieces if piece.logprobs is not None]),
                finish_reason=pieces[-1].finish_reason,
            )
            for index, pieces in enumerate(self._pieces)
        ]
        return Completion(**self._heading.fields(), choices=choices, usage=self._usage.total())


def _joined(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs | None:
    if not pieces:
        return None
    return CompletionLogprobs(
        tokens=[token for piece in pieces for token in piece.tokens],
        token_logprobs=[logprob for piece in pieces for logprob in piece.token_logprobs],
        top_logprobs=[top for piece in pieces for top in piece.top_logprobs],
        text_offset=[offset for piece in pieces for offset in piece.text_offset],
    )


class CompletionShape(Shape):
    """Events to chunks.  The frame around a text is made once for each choice, since there is one for each token."""

    def __init__(self, heading: Heading, readers: Sequence[CompletionReader], n: int, *, include_usage: bool) -> None:
        self._base = heading.fields()
        self._readers = readers
        self._include_usage = include_usage
        self._around: list[tuple[bytes, bytes] | None] = [None] * len(readers)
        self._num_running = len(readers)
        self._usage = UsageSum(n)

    def frames(self, index: int, event: TokenEvent) -> Iterable[bytes]:
        """A choice's text, then its finish reason; after the last the usage when asked for, and ``[DONE]``."""
        piece = self._readers[index].read(event)
        if piece.finish_reason is not None or (piece.logprobs is not None and piece.logprobs.tokens):
            yield self._chunk(index, piece)
        elif piece.text:
            around = self._around[index]
            if around is None:
                around = self._around[index] = self._split(index)
            yield around[0] + to_json(piece.text) + around[1]
        if piece.usage is not None and piece.finish_reason is not None:
            self._usage.add(index, piece.usage)
            self._num_running -= 1
            if not self._num_running:
                yield from self._end()

    def _end(self) -> Iterable[bytes]:
        if self._include_usage:
            yield frame(to_json(Completion(**self._base, choices=[], usage=self._usage.total())))
        yield DONE

    def _split(self, index: int) -> tuple[bytes, bytes]:
        before, _, after = self._chunk(index, Piece(TEXT, None, None, None)).partition(to_json(TEXT))
        return before, after

    def _chunk(self, index: int, piece: Piece) -> bytes:
        choice = CompletionChoice(
            index=index, text=piece.text, logprobs=piece.logprobs, finish_reason=piece.finish_reason
        )
        chunk = Completion(**self._base, choices=[choice])
        return frame(chunk.model_dump_json(exclude=None if self._include_usage else {"usage"}).encode())
