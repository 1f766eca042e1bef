"""How the wire's values are read: literally, and with the fields that clients of compatible servers add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

INT64_MAX = 2**63 - 1


class Wire(BaseModel):
    """Types are taken literally: ``"5"`` is no number."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class UnreadPart(Wire):
    """A piece of a message that is no text: refused by name after validation, or an image replaced by a note."""

    def replaced(self, note: str) -> Wire | None:
        """The text in place of an image; None where it is none."""
        del note
        return None


class RequestBody(Wire):
    """A body whose every field is done, ignored by design, or refused by name unless its value asks for nothing."""

    IGNORED: ClassVar[frozenset[str]] = frozenset()
    """Fields without effect: they do not change what a single model on its own server answers."""
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not implemented, with the values that ask for nothing and are accepted."""
    GENERATES: ClassVar[bool] = False
    """Whether tokens are made of it, so that another route's field would have changed them."""
    CALLED: ClassVar[Mapping[str, str]] = {}
    """Fields of other routes, with what says the same here."""


def at_most(limit: int) -> BeforeValidator:
    """Count an object's entries before each of them is checked and explained."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(cast("dict[Any, Any]", value)) > limit:
            raise ValueError(f"there may be at most {limit} entries")
        return cast("Any", value)

    return BeforeValidator(check)


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None, at_most(16)
]
"""What a caller notes down, in OpenAI's bounds."""

Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
"""Lists stop at their first wrong item: a body with a million of them must not cost a million explanations."""
