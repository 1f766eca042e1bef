"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """Of one check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check's result: ``message`` says what was seen, and for a failure what to do; ``details`` are figures."""

    name: str
    status: Status
    message: str
    details: dict[str, Any] = field(default_factory=dict[str, Any])


def passed(name: str, message: str, **details: Any) -> Outcome:
    """It is as promised."""
    return Outcome(name, Status.PASSED, message, details)


def failed(name: str, message: str, **details: Any) -> Outcome:
    """It is not."""
    return Outcome(name, Status.FAILED, message, details)


def skipped(name: str, message: str, **details: Any) -> Outcome:
    """It cannot be seen here."""
    return Outcome(name, Status.SKIPPED, message, details)
