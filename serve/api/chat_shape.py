"""A chat completion's events to its wire: one reading of each choice, sent as chunks or folded into the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic_core import to_json

from serve.api.chat_reader import ChatReader, Message, WireFinish
from serve.api.heading import Heading
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
    FunctionCallOut,
    FunctionDelta,
    ToolCallDelta,
    ToolCallOut,
)
from serve.api.sse import DONE, TEXT, Shape, frame
from serve.chat.output.parts import Part
from serve.types import TokenEvent


class ChatAnswer:
    """The fold: all pieces of every choice, joined."""

    def __init__(self, heading: Heading, readers: Sequence[ChatReader]) -> None:
        self._heading = heading
        self._readers = readers
        self._messages = [Message() for _ in readers]
        self._usage = UsageSum(len(readers))

    def add(self, index: int, event: TokenEvent) -> None:
        """Take the next event of a choice."""
        self._messages[index].add(self._readers[index].read(event))
        if event.usage is not None:
            self._usage.add(index, event.usage, self._readers[index].reasoning_tokens)

    def body(self) -> ChatCompletion:
        """The whole answer."""
        choices = [self._choice(index, message) for index, message in enumerate(self._messages)]
        return ChatCompletion(**self._heading.fields(), choices=choices, usage=self._usage.total())

    def _choice(self, index: int, message: Message) -> Choice:
        if message.finish_reason is None:
            raise RuntimeError(f"choice {index} ended without a finish reason")
        has_logprobs = self._readers[index].has_logprobs
        return Choice(
            index=index,
            message=_assistant(message),
            logprobs=ChoiceLogprobs(content=message.logprobs) if has_logprobs else None,
            finish_reason=message.finish_reason,
        )


def _assistant(message: Message) -> AssistantMessage:
    calls = [
        ToolCallOut(id=call_id, function=FunctionCallOut(name=name, arguments="".join(arguments)))
        for call_id, name, arguments in message.calls
    ]
    reasoning = message.reasoning
    return AssistantMessage(
        content=message.content, tool_calls=calls or None, reasoning_content=reasoning, reasoning=reasoning
    )


def _delta(part: Part) -> Delta:
    if part.call is not None:
        call = part.call
        head: Any = {"id": call.id, "type": "function"} if call.name is not None else {}
        function = FunctionDelta(name=call.name, arguments=call.arguments)
        return Delta(tool_calls=[ToolCallDelta(index=call.index, function=function, **head)])
    return Delta(reasoning_content=part.reasoning, reasoning=part.reasoning)


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
            content = "".join(part.content for part in piece.parts)
            yield self._chunk(index, Delta(content=content), logprobs=piece.logprobs)
        for part in piece.parts:
            if not part.content:
                yield self._chunk(index, _delta(part))
            elif not piece.logprobs:
                yield around[0] + to_json(part.content) + around[1]
        if piece.finish_reason is not None:
            yield self._chunk(index, Delta(), piece.finish_reason)
            if event.usage is not None:
                self._usage.add(index, event.usage, self._readers[index].reasoning_tokens)
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
