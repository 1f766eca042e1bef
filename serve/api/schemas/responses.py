"""The wire of ``POST /v1/responses``: what a request holds.

Sources: OpenAI's specification v2.3.0, and Open Responses of 2026-04-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from serve.api.schemas.sampling import SamplingFields
from serve.api.schemas.tools import MAX_TURN_TOOLS
from serve.api.schemas.wire import Metadata, UnreadPart, Wire


class TextPart(Wire):
    """A piece of text, of the user's, the assistant's or a tool's."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(default=None, description="Ignored.")
    logprobs: list[Any] | None = Field(default=None, description="Ignored.")


class RefusalPart(Wire):
    """An assistant's words when it declined."""

    type: Literal["refusal"]
    refusal: str


class OtherPart(UnreadPart):
    """Any other piece: refused by name after validation."""

    type: Literal["input_image", "input_file", "input_audio", "input_video", "computer_screenshot"] = Field(
        description="Only texts and refusals are read; others are refused by name."
    )

    def replaced(self, note: str) -> TextPart | None:
        """The text in place of an image."""
        return TextPart(type="input_text", text=note) if self.type == "input_image" else None


Part = Annotated[TextPart | RefusalPart | OtherPart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(fail_fast=True)]


class MessageItem(Wire):
    """One message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: str | None = Field(default=None, description="Ignored, but listed.")
    status: str | None = Field(default=None, description="Ignored.")
    phase: str | None = Field(default=None, description="Ignored.")


class FunctionCallItem(Wire):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1, max_length=64)]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    id: str | None = Field(default=None, description="Ignored, but listed.")
    status: str | None = Field(default=None, description="Ignored.")


class FunctionCallOutputItem(Wire):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1, max_length=64)]
    output: str | Parts
    id: str | None = Field(default=None, description="Ignored, but listed.")
    status: str | None = Field(default=None, description="Ignored.")


class ReasoningText(Wire):
    """A piece of the model's thoughts, or of their summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Wire):
    """The model's earlier thoughts.  ``encrypted_content`` is another server's and is not read."""

    type: Literal["reasoning"]
    id: str | None = Field(default=None, description="Ignored, but listed.")
    summary: Annotated[list[ReasoningText], Field(fail_fast=True)] = Field(default_factory=list[ReasoningText])
    content: Annotated[list[ReasoningText] | None, Field(fail_fast=True)] = None
    encrypted_content: str | None = Field(default=None, description="Ignored.")
    status: str | None = Field(default=None, description="Ignored.")


class ItemReference(Wire):
    """An item of a stored response: refused by name after validation."""

    type: Literal["item_reference"] = "item_reference"
    id: str


class OtherItem(Wire):
    """Any other item, such as ``web_search_call``: refused by name after validation."""

    type: str


_KINDS = {"message", "function_call", "function_call_output", "reasoning", "item_reference"}


def _kind(value: Any) -> str:
    """Which item it is; one without a ``type`` is a message, or a reference where it has nothing but an id."""
    given: Any = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if given is None:
        return "item_reference" if isinstance(value, dict) and set(value) == {"id"} else "message"  # pyright: ignore[reportUnknownArgumentType]
    return given if isinstance(given, str) and given in _KINDS else "other"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_kind),
]


class FunctionTool(Wire):
    """A function that the model may call.  Tools of another ``type`` are refused by name."""

    type: str = Field(description="Only function; built-in tools are refused by name.")
    name: Annotated[str | None, Field(min_length=1, max_length=64)] = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolName(Wire):
    """A tool by its name."""

    type: str
    name: str | None = None


class ToolChoice(Wire):
    """One function, or some of them."""

    type: str = Field(description="function or allowed_tools; others are refused by name.")
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[ToolName] | None, Field(max_length=MAX_TURN_TOOLS, fail_fast=True)] = None


class TextFormat(Wire):
    """Any text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Wire):
    """The form of the text."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Refused: anything but medium.")


class Reasoning(Wire):
    """How hard the model thinks."""

    effort: str | None = Field(None, description="As reasoning_effort of a chat completion.")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Ignored: thoughts are told in full."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Ignored: thoughts are told in full."
    )


class ResponsesRequest(SamplingFields):
    """The request body."""

    IGNORED: ClassVar[frozenset[str]] = SamplingFields.IGNORED | {
        "max_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    }  # fmt: skip
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingFields.NEUTRAL,
        "context_management": ([],),
        "conversation": (),
        "n": (1,),
        "prompt": (),
        "truncation": ("disabled",),
    }
    CALLED: ClassVar[Mapping[str, str]] = {
        "logprobs": "top_logprobs",
        "max_completion_tokens": "max_output_tokens",
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "stop_sequences": "stop",
        "system": "instructions",
    }

    model: str = Field(description="An id that GET /v1/models lists.")
    input: str | Annotated[list[Item], Field(min_length=1, fail_fast=True)] | None = Field(
        None,
        description="A user's text, or items; item_reference and those of built-in tools are refused by name. May be "
        "left out beside previous_response_id.",
    )
    instructions: str | None = Field(None, description="A system message before everything else.")
    previous_response_id: str | None = Field(None, description="Goes on from a response that is still stored.")
    store: bool | None = Field(None, description="Keep the response for a while. Default: true.")
    max_output_tokens: Annotated[int | None, Field(ge=1, description="Null: all that fits.")] = None
    max_tool_calls: Annotated[int | None, Field(ge=1, description="There are no built-in tools to count.")] = None
    tools: Annotated[list[FunctionTool] | None, Field(max_length=MAX_TURN_TOOLS, fail_fast=True)] = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(None, description="Default: auto.")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer.")
    text: TextConfig | None = Field(None, description="The form of the text.")
    reasoning: Reasoning | None = Field(None, description="400 where the model's chat template cannot think.")
    include: Annotated[list[str] | None, Field(max_length=16)] = Field(
        None, description="message.output_text.logprobs, reasoning.encrypted_content (no effect); no other."
    )
    top_logprobs: Annotated[int | None, Field(ge=0, le=20, description="Of the likeliest tokens.")] = None
    metadata: Metadata = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="As in a chat completion.")
    background: bool | None = Field(None, description="Answer at once and go on; ask for the response by its id.")
    conversation: str | dict[str, Any] | None = None
    context_management: Annotated[list[dict[str, Any]] | None, Field(fail_fast=True)] = None
    prompt: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: str | None = None
    safety_identifier: Annotated[str | None, Field(max_length=64)] = None
    prompt_cache_key: Annotated[str | None, Field(max_length=64)] = None
    prompt_cache_retention: str | None = None
