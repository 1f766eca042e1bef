"""The wire of ``POST /v1/responses``: the events of a stream, in the order in which they may come."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from serve.api.schemas.chat import ChatLogprob
from serve.api.schemas.common import ErrorBody
from serve.api.schemas.response_resource import OutputItem, OutputText, ReasoningContent, Response


class Event(BaseModel):
    """Numbered from 0."""

    sequence_number: int


class ResponseEvent(Event):
    """The response begins, runs or has ended."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: Response


class ItemEvent(Event):
    """An item begins, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class InItem(Event):
    """Something happens inside an item."""

    item_id: str
    output_index: int


class ContentPartEvent(InItem):
    """A message's or a reasoning's only part begins, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0] = 0
    part: OutputText | ReasoningContent


class TextDelta(InItem):
    """More text."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    content_index: Literal[0] = 0
    delta: str
    logprobs: list[ChatLogprob] = Field(default_factory=list[ChatLogprob])


class TextDone(InItem):
    """All of the text."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    content_index: Literal[0] = 0
    text: str
    logprobs: list[ChatLogprob]


class ReasoningDelta(InItem):
    """More thoughts."""

    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    content_index: Literal[0] = 0
    delta: str


class ReasoningDone(InItem):
    """All of the thoughts."""

    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    content_index: Literal[0] = 0
    text: str


class ArgumentsDelta(InItem):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    delta: str


class ArgumentsDone(InItem):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    name: str
    arguments: str


class ErrorEvent(Event):
    """The stream failed.  OpenAI's clients read the fields here, those of Open Responses the ones of ``error``."""

    type: Literal["error"] = "error"
    code: str | None
    message: str
    param: str | None
    error: ErrorBody
