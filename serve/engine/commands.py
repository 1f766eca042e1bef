"""What the event loop asks of the engine's thread."""

from __future__ import annotations

from dataclasses import dataclass

from serve.errors import ServeError
from serve.types import GenerationRequest


@dataclass(frozen=True, slots=True)
class Add:
    """Queue a request that came at ``submitted_at``, in seconds of :func:`time.perf_counter`."""

    request: GenerationRequest
    submitted_at: float


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop a request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class FailWaiting:
    """End every request that has no slot yet."""

    error: ServeError


Command = Add | Abort | FailWaiting | None
"""None ends the thread."""
