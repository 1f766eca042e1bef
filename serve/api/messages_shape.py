"""An answer's blocks to Anthropic's wire: as events, and folded into the whole message."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any, cast

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from serve.api.blocks import Block, BlockReader, Change, Growth, Kind
from serve.api.errors import message_error_json, status_of
from serve.api.schemas.message_events import (
    AnthropicMessage,
    Content,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    MessageDelta,
    MessageDeltaUsage,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputTokensDetails,
    Ping,
    StopDelta,
    StopReason,
    TextContent,
    TextDelta,
    ThinkingContent,
    ThinkingDelta,
    ToolUseContent,
)
from serve.api.sse import TEXT, Shape, named_frame
from serve.errors import ServeError
from serve.types import FinishReason, TokenEvent, Usage

_REASONS: dict[FinishReason, StopReason] = {
    FinishReason.STOP: "end_turn",
    FinishReason.LENGTH: "max_tokens",
    FinishReason.TOOL_CALLS: "tool_use",
}


class MessageAnswer:
    """The fold: the whole message.

    Args:
        model: The served name.
        num_prompt_tokens: Of the request.
        max_tokens: As asked for; fewer may have fitted.
        reader: Of its only choice.
    """

    def __init__(self, model: str, num_prompt_tokens: int, max_tokens: int, reader: BlockReader) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self.reader = reader

    def add(self, index: int, event: TokenEvent) -> None:
        """Take the next event."""
        del index
        for _ in self.reader.read(event):
            pass

    def body(self) -> AnthropicMessage:
        """The message so far."""
        stop = self.stop()
        return AnthropicMessage(
            id=self._id,
            model=self._model,
            content=[_content(block) for block in self.reader.blocks],
            stop_reason=stop.stop_reason if stop else None,
            stop_sequence=stop.stop_sequence if stop else None,
            usage=MessageUsage.model_validate(self.usage().model_dump()),
        )

    def stop(self) -> StopDelta | None:
        """Why it ended, once it has."""
        if self.reader.finish_reason is None:
            return None
        reason = _REASONS[self.reader.finish_reason]
        if reason == "end_turn" and self.reader.stop is not None:
            return StopDelta(stop_reason="stop_sequence", stop_sequence=self.reader.stop)
        if reason == "max_tokens" and self.usage().output_tokens < self._max_tokens:
            reason = "model_context_window_exceeded"
        return StopDelta(stop_reason=reason, stop_sequence=None)

    def usage(self) -> MessageDeltaUsage:
        """Tokens so far: those of the prompt are known from the beginning."""
        usage = self.reader.usage or Usage(self._num_prompt_tokens, 0)
        return MessageDeltaUsage(
            input_tokens=usage.prompt_tokens - usage.cached_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(thinking_tokens=self.reader.reasoning_tokens),
        )


class MessageShape(Shape):
    """The events of a message, from one reading of its answer.

    What is around the text of a delta is made once for each block, since there is one delta for each token.
    """

    def __init__(self, answer: MessageAnswer, request_id: str) -> None:
        self._answer = answer
        self._request_id = request_id
        self._around: tuple[Block, bytes, bytes] | None = None

    keep_alive = named_frame("ping", to_json(Ping()))

    def opening(self) -> bytes:
        """The message begins before its first token."""
        return _frame(MessageStart(message=self._answer.body()))

    def frames(self, index: int, event: TokenEvent) -> Iterable[bytes]:
        """The blocks' events; after the last one stop reason, usage and the end."""
        del index
        for growth in self._answer.reader.read(event):
            yield from self._frames(growth)
        if (stop := self._answer.stop()) is not None:
            yield _frame(MessageDelta(delta=stop, usage=self._answer.usage()))
            yield _frame(MessageStop())

    def _frames(self, growth: Growth) -> Iterator[bytes]:
        block = growth.block
        match growth.change:
            case Change.OPENED:
                yield _frame(ContentBlockStart(index=block.index, content_block=_content(block)))
            case Change.CLOSED:
                yield _frame(ContentBlockStop(index=block.index))
            case Change.GREW if growth.text:
                if self._around is None or self._around[0] is not block:
                    whole = _frame(ContentBlockDelta(index=block.index, delta=_delta(block.kind, TEXT)))
                    before, _, after = whole.partition(to_json(TEXT))
                    self._around = (block, before, after)
                yield self._around[1] + to_json(growth.text) + self._around[2]
            case _:
                pass

    def failed(self, error: ServeError) -> bytes:
        """The last event of a stream that failed."""
        return named_frame("error", message_error_json(status_of(error), error.message, self._request_id))


def _frame(event: BaseModel) -> bytes:
    return named_frame(cast("Any", event).type, to_json(event))


def _delta(kind: Kind, text: str) -> TextDelta | ThinkingDelta | InputJsonDelta:
    match kind:
        case Kind.TEXT:
            return TextDelta(text=text)
        case Kind.REASONING:
            return ThinkingDelta(thinking=text)
        case Kind.CALL:
            return InputJsonDelta(partial_json=text)


def _content(block: Block) -> Content:
    match block.kind:
        case Kind.TEXT:
            return TextContent(text=block.text)
        case Kind.REASONING:
            return ThinkingContent(thinking=block.text)
        case Kind.CALL:
            # The prefix is what Anthropic's clients know; the rest names the call on every wire.
            call_id = "toolu_" + block.call_id.removeprefix("call_")
            return ToolUseContent(id=call_id, name=block.name, input=_input(block.text))


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as far as they go: ``max_tokens`` may have cut them."""
    try:
        value: Any = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
