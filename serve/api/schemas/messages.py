"""The wire of ``POST /v1/messages`` and ``POST /v1/messages/count_tokens``: what a request holds.

Source: Anthropic's OpenAPI document, as of its Python client 2.14.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from serve.api.schemas.tools import MAX_TURN_TOOLS, TOOL_NAME_PATTERN
from serve.api.schemas.wire import RequestBody, UnreadPart, Wire

MAX_STOP_SEQUENCES = 64

CacheControl = Annotated[dict[str, Any] | None, Field(description="Ignored: caching needs no hint.")]


class TextBlock(Wire):
    """A piece of text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl = None
    citations: list[Any] | None = Field(default=None, description="Ignored.")


class ToolUseBlock(Wire):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    input: dict[str, Any]
    cache_control: CacheControl = None
    caller: dict[str, Any] | None = Field(default=None, description="Ignored.")


class ThinkingBlock(Wire):
    """An assistant's earlier thoughts."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(default=None, description="Ignored.")


class RedactedThinkingBlock(Wire):
    """Thoughts that only Anthropic could read: left out of the prompt."""

    type: Literal["redacted_thinking"]
    data: str = Field(description="Ignored: left out of the prompt.")


class OtherBlock(UnreadPart):
    """Any other block: refused by name after validation."""

    type: Literal[
        "image", "document", "search_result", "container_upload", "server_tool_use", "web_search_tool_result",
        "web_fetch_tool_result", "code_execution_tool_result", "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result", "tool_search_tool_result", "tool_reference", "mcp_tool_use",
        "mcp_tool_result", "compaction",
    ] = Field(description="Text, tool_use, tool_result and thinking are read; others refused by name.")  # fmt: skip

    def replaced(self, note: str) -> TextBlock | None:
        """The text in place of an image."""
        return TextBlock(type="text", text=note) if self.type == "image" else None


ResultPart = Annotated[TextBlock | OtherBlock, Field(discriminator="type")]


class ToolResultBlock(Wire):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: str | Annotated[list[ResultPart], Field(fail_fast=True)] | None = None
    is_error: bool | None = Field(default=None, description="Ignored: the content says it.")
    cache_control: CacheControl = None


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock | OtherBlock,
    Field(discriminator="type"),
]


class InputMessage(Wire):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]


class Tool(Wire):
    """A function that the model may call.  Anthropic's own tools have another ``type`` and are refused by name."""

    type: str | None = Field(None, description="Only custom; Anthropic's own tools are refused by name.")
    name: Annotated[str, Field(pattern=TOOL_NAME_PATTERN)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: CacheControl = None


class ToolChoice(Wire):
    """Whether the model may, must or must not call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Wire):
    """Whether the model thinks before it answers; ``budget_tokens`` chooses an effort, it is no limit."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int | None, Field(ge=1024, description="Chooses an effort, sets no limit.")] = None
    display: str | None = Field(default=None, description="Ignored.")


class OutputFormat(Wire):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Wire):
    """How hard the model tries, and the form of its answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Wire):
    """Has no effect."""

    user_id: Annotated[str | None, Field(max_length=512)] = None


class CountTokensRequest(RequestBody):
    """A conversation whose tokens are counted, and the part of a request that the prompt is made of."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"cache_control", "context_management"})
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "container": (),
        "mcp_servers": ([],),
        "output_format": (),
    }

    model: str = Field(description="An id that GET /v1/models lists.")
    messages: Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)] = Field(
        description="The conversation, oldest message first; the last one is not the assistant's."
    )
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = Field(
        None, description="What goes before the conversation."
    )
    tools: Annotated[list[Tool] | None, Field(max_length=MAX_TURN_TOOLS, fail_fast=True)] = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(None, description="Default: auto.")
    thinking: Thinking | None = Field(None, description="400 where the model's chat template cannot think.")
    output_config: OutputConfig | None = Field(None, description="Effort, and the schema of the text.")
    cache_control: CacheControl = None
    container: str | dict[str, Any] | None = None
    context_management: dict[str, Any] | None = Field(None, description="Nothing is cleared: what is sent is read.")
    mcp_servers: Annotated[list[dict[str, Any]] | None, Field(fail_fast=True)] = None
    output_format: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    """The request body."""

    IGNORED: ClassVar[frozenset[str]] = CountTokensRequest.IGNORED | {"inference_geo", "metadata", "service_tier"}
    GENERATES: ClassVar[bool] = True
    CALLED: ClassVar[Mapping[str, str]] = {
        "input": "messages",
        "instructions": "system",
        "max_completion_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "prompt": "messages",
        "reasoning_effort": "output_config.effort",
        "response_format": "output_config.format",
        "stop": "stop_sequences",
    }

    max_tokens: Annotated[int, Field(ge=1, description="At most; or what fits, where that is less.")]
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None, Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True)
    ] = Field(
        None, description="Where to end; the text holds nothing of it. A tool_use that tool_choice demands is not cut."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    temperature: Annotated[float | None, Field(ge=0, le=1, description="0 is greedy.")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="Keep the likeliest tokens up to this sum.")] = None
    top_k: Annotated[int | None, Field(ge=0, le=2**31, description="0 keeps the whole vocabulary.")] = None
