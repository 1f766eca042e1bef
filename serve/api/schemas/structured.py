"""The fields that say what an answer's text must look like, for every route that generates text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from serve.api.schemas.wire import Wire

NAME_PATTERN = "^[A-Za-z0-9_-]{1,64}$"


class TextFormat(Wire):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Wire):
    """A schema and its name."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Left out: any JSON object.")
    strict: bool | None = Field(default=None, description="Ignored: what is asked for is always enforced.")
    description: str | None = None


class JsonSchemaFormat(Wire):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Wire):
    """The same constraints in the form of vLLM; exactly one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema, or one in a string.")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = Field(None, description="Lark or GBNF.")


class StructuredFields(Wire):
    """At most one of these constrains the text."""

    response_format: ResponseFormat | None = Field(None, description="text, json_object or json_schema.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's form: exactly one constraint.")
    guided_json: dict[str, Any] | str | None = Field(None, description="A JSON schema, or one in a string.")
    guided_regex: str | None = Field(None, description="The whole text matches it.")
    guided_choice: list[str] | None = Field(None, description="The text is one of them.")
    guided_grammar: str | None = Field(None, description="Lark or GBNF.")
