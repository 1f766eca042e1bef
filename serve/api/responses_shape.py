"""An answer's blocks to the Responses API: as events, and folded into the whole response."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic_core import to_json

from serve.api.blocks import Block, BlockReader, Change, Growth, Kind
from serve.api.errors import error_body, status_of
from serve.api.schemas.response_events import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartEvent,
    ErrorEvent,
    Event,
    ItemEvent,
    ReasoningDelta,
    ReasoningDone,
    ResponseEvent,
    TextDelta,
    TextDone,
)
from serve.api.schemas.response_resource import (
    IncompleteDetails,
    InputTokensDetails,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    ReasoningContent,
    Response,
    ResponseError,
    ResponseUsage,
    Status,
)
from serve.api.sse import TEXT, Shape, named_frame
from serve.errors import ServeError
from serve.types import FinishReason, TokenEvent

PREFIXES = {Kind.TEXT: "msg_", Kind.REASONING: "rs_", Kind.CALL: "fc_"}


class ResponseAnswer:
    """The fold: the whole response.

    Args:
        begun: The response without output.
        reader: Of its only choice.
        on_end: Called with the response when it has ended.
    """

    def __init__(self, begun: Response, reader: BlockReader, on_end: Callable[[Response], None]) -> None:
        self._begun = begun
        self._on_end = on_end
        self._item_ids: list[str] = []
        self._is_broken_off = False
        self._ended: Response | None = None
        self.reader = reader

    def add(self, index: int, event: TokenEvent) -> None:
        """Take the next event."""
        del index
        for _ in self.read(event):
            pass

    def read(self, event: TokenEvent) -> Iterator[Growth]:
        """What the next event changes."""
        yield from self.reader.read(event)
        if self.reader.finish_reason is FinishReason.LENGTH:
            self._end(status="incomplete", incomplete_details=IncompleteDetails(reason="max_output_tokens"))
        elif self.reader.finish_reason is not None:
            self._end(status="completed", completed_at=int(time.time()))

    def body(self) -> Response:
        """The response so far."""
        return self._ended or self._with()

    def fail(self, error: ServeError) -> Response:
        """The response, which ends with ``error``."""
        code = "rate_limit_exceeded" if status_of(error) == 429 else "server_error"
        self._is_broken_off = True
        return self._end(status="failed", error=ResponseError(code=code, message=error.message))

    def cancel(self) -> Response:
        """The response, which its caller has ended."""
        self._is_broken_off = True
        return self._end(status="cancelled")

    def _end(self, **fields: Any) -> Response:
        self._ended = self._with(**fields)
        self._on_end(self._ended)
        return self._ended

    def _with(self, **fields: Any) -> Response:
        output = [self.item(block) for block in self.reader.blocks]
        return self._begun.model_copy(update={"output": output, "usage": self._usage(), **fields})

    def item_id(self, block: Block) -> str:
        """Names a block's item."""
        while len(self._item_ids) <= block.index:
            self._item_ids.append(uuid.uuid4().hex)
        return PREFIXES[block.kind] + self._item_ids[block.index]

    def item(self, block: Block) -> OutputItem:
        """A block as an item, as far as it has come."""
        item_id, status = self.item_id(block), self._status(block)
        match block.kind:
            case Kind.TEXT:
                texts = [OutputText(text=block.text, logprobs=block.logprobs)] if block.texts else []
                return OutputMessage(id=item_id, status=status, content=texts)
            case Kind.REASONING:
                content = [ReasoningContent(text=block.text)] if block.texts else []
                return OutputReasoning(id=item_id, status=status, content=content)
            case Kind.CALL:
                return OutputFunctionCall(
                    id=item_id, call_id=block.call_id, name=block.name, arguments=block.text, status=status
                )

    def _status(self, block: Block) -> Status:
        if not block.is_closed:
            return "incomplete" if self._is_broken_off else "in_progress"
        is_cut = self.reader.finish_reason is FinishReason.LENGTH and block is self.reader.blocks[-1]
        return "incomplete" if is_cut else "completed"

    def _usage(self) -> ResponseUsage | None:
        usage = self.reader.usage
        if usage is None:
            return None
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self.reader.reasoning_tokens),
            total_tokens=usage.total_tokens,
        )


def _part(block: Block) -> OutputText | ReasoningContent:
    """The only part of a message or of a reasoning."""
    if block.kind is Kind.TEXT:
        return OutputText(text=block.text, logprobs=block.logprobs)
    return ReasoningContent(text=block.text)


NUMBER = b'"sequence_number":'


class ResponseShape(Shape):
    """The events of a response, from one reading of its answer.

    What is around number and text of a delta is made once for each block, since there is one delta for each token.
    """

    def __init__(self, answer: ResponseAnswer) -> None:
        self._answer = answer
        self._next_number = 0
        self._around: tuple[Block, bytes, bytes, bytes] | None = None

    def opening(self) -> bytes:
        """The response begins before its first token."""
        begun = self._answer.body()
        return self._whole("response.created", begun) + self._whole("response.in_progress", begun)

    def frames(self, index: int, event: TokenEvent) -> Iterable[bytes]:
        """The items' events; after the last one the response."""
        del index
        for growth in self._answer.read(event):
            yield from self._frames(growth)
        if self._answer.reader.finish_reason is not None:
            whole = self._answer.body()
            yield self._whole(f"response.{whole.status}", whole)

    def failed(self, error: ServeError) -> bytes:
        """The response, failed, and the error, which clients of OpenAI raise."""
        whole = self._whole("response.failed", self._answer.fail(error))
        body = error_body(error)
        event = ErrorEvent(
            sequence_number=self._number(), code=body.code, message=body.message, param=body.param, error=body
        )
        return whole + _frame(event)

    def _frames(self, growth: Growth) -> Iterator[bytes]:
        match growth.change:
            case Change.OPENED:
                yield from self._opened(growth.block)
            case Change.GREW:
                yield self._grew(growth)
            case Change.CLOSED:
                yield from self._closed(growth.block)

    def _opened(self, block: Block) -> Iterator[bytes]:
        yield self._of_item("response.output_item.added", block)
        if block.kind is not Kind.CALL:
            yield self._of_part("response.content_part.added", block)

    def _grew(self, growth: Growth) -> bytes:
        if growth.logprobs:
            return _frame(TextDelta(**self._where(growth.block), delta=growth.text, logprobs=list(growth.logprobs)))
        if self._around is None or self._around[0] is not growth.block:
            self._around = (growth.block, *self._split(growth.block))
        _, before, between, after = self._around
        return before + str(self._number()).encode() + between + to_json(growth.text) + after

    def _split(self, block: Block) -> tuple[bytes, bytes, bytes]:
        deltas = {Kind.TEXT: TextDelta, Kind.REASONING: ReasoningDelta, Kind.CALL: ArgumentsDelta}
        where: dict[str, Any] = {"sequence_number": 0, **self._item(block)}
        event = deltas[block.kind](**where, delta=TEXT)
        before, _, rest = _frame(event).partition(NUMBER + b"0")
        between, _, after = rest.partition(to_json(TEXT))
        return before + NUMBER, between, after

    def _closed(self, block: Block) -> Iterator[bytes]:
        where, text = self._where(block), block.text
        match block.kind:
            case Kind.TEXT:
                yield _frame(TextDone(**where, text=text, logprobs=block.logprobs))
            case Kind.REASONING:
                yield _frame(ReasoningDone(**where, text=text))
            case Kind.CALL:
                yield _frame(ArgumentsDone(**where, name=block.name, arguments=text))
        if block.kind is not Kind.CALL:
            yield self._of_part("response.content_part.done", block)
        yield self._of_item("response.output_item.done", block)

    def _where(self, block: Block) -> dict[str, Any]:
        return {"sequence_number": self._number(), **self._item(block)}

    def _item(self, block: Block) -> dict[str, Any]:
        return {"item_id": self._answer.item_id(block), "output_index": block.index}

    def _of_part(self, kind: Any, block: Block) -> bytes:
        return _frame(ContentPartEvent(type=kind, **self._where(block), part=_part(block)))

    def _of_item(self, kind: Any, block: Block) -> bytes:
        item = self._answer.item(block)
        return _frame(ItemEvent(type=kind, sequence_number=self._number(), output_index=block.index, item=item))

    def _whole(self, kind: Any, response: Response) -> bytes:
        return _frame(ResponseEvent(type=kind, sequence_number=self._number(), response=response))

    def _number(self) -> int:
        number, self._next_number = self._next_number, self._next_number + 1
        return number


def _frame(event: Event) -> bytes:
    kind: Any = event
    return named_frame(kind.type, to_json(event))
