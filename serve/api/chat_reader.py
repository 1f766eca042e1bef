"""One choice's events taken apart, for the stream and for the whole answer alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.api.logprobs import TokenBytes, chat_logprobs
from serve.api.schemas.chat import ChatLogprob
from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Part
from serve.types import FinishReason, TokenEvent

WireFinish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to its choice, as the wire tells it."""

    parts: Sequence[Part] = ()
    logprobs: Sequence[ChatLogprob] = ()
    """Those of the content's tokens."""
    finish_reason: WireFinish | None = None


class ChatReader:
    """Reads the events of one choice.

    Args:
        parser: Takes the model's text apart; None: all of it is content.
        token_bytes: For log-probabilities, where they were asked for.
        is_single: Leave out all calls but the first.
    """

    def __init__(
        self, parser: OutputParser | None = None, token_bytes: TokenBytes | None = None, *, is_single: bool = False
    ) -> None:
        self._parser = parser
        self._token_bytes = token_bytes
        self._held: list[ChatLogprob] = []
        self._is_single = is_single
        self.reasoning_tokens = 0

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self._token_bytes is not None

    def read(self, event: TokenEvent) -> Piece:
        """The next piece of the choice."""
        parts = self._parts(event)
        finish_reason: Any = event.finish_reason.value if event.finish_reason else None
        parser = self._parser
        if event.finish_reason is FinishReason.STOP and parser and parser.num_calls and not parser.is_cut:
            finish_reason = FinishReason.TOOL_CALLS.value
        logprobs = self._logprobs(event, parts) if self._token_bytes else ()
        return Piece(parts, logprobs, finish_reason)

    def _logprobs(self, event: TokenEvent, parts: Sequence[Part]) -> Sequence[ChatLogprob]:
        """Those that come with this event's content: of tokens that turn out to be none they are left out."""
        if self._token_bytes:
            self._held += chat_logprobs(event.logprobs, self._token_bytes)
        if self._parser is not None and not parts:
            return ()
        held, self._held = self._held, []
        return held if self._parser is None or any(part.content for part in parts) else ()

    def _parts(self, event: TokenEvent) -> Sequence[Part]:
        parser = self._parser
        if parser is None:
            return (Part(content=event.text),) if event.text else ()
        self.reasoning_tokens += parser.is_reasoning and event.token_id is not None
        parts = parser.push(event.text) if event.text else []
        if event.finish_reason is not None:
            is_truncated = event.finish_reason is FinishReason.LENGTH or event.stop is not None
            parts += parser.finish(is_truncated=is_truncated)
        return [part for part in parts if not (self._is_single and part.call and part.call.index)]


class Message:
    """A choice's pieces, joined."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.logprobs: list[ChatLogprob] = []
        self.finish_reason: WireFinish | None = None
        self.calls: list[tuple[str, str, list[str]]] = []
        """Id, name and the pieces of the arguments."""

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        for part in piece.parts:
            self._add_part(part)
        self.logprobs += piece.logprobs
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason

    def _add_part(self, part: Part) -> None:
        self._content.append(part.content)
        self._reasoning.append(part.reasoning)
        if part.call is not None:
            if part.call.name is not None:
                self.calls.append((part.call.id or "", part.call.name, []))
            self.calls[part.call.index][2].append(part.call.arguments)

    @property
    def content(self) -> str | None:
        """The text; None where there are only calls."""
        return "".join(self._content) or (None if self.calls else "")

    @property
    def reasoning(self) -> str | None:
        """The reasoning, where there is some."""
        return "".join(self._reasoning) or None
