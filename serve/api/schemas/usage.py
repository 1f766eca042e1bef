"""What ``GET /usage`` answers."""

from __future__ import annotations

from datetime import date

from pydantic import BaseModel


class UsageSums(BaseModel):
    """One caller's, for one model, route and day.

    ``failed`` of the requests ended with an error.  ``ttft_ms`` is a mean; what was not measured is null.
    """

    caller: str
    model: str | None
    route: str
    day: date
    requests: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_ms: float | None
    machine_ms: float | None
    cost_usd: float | None


class UsageReport(BaseModel):
    """All of them since a day (UTC)."""

    since: date
    usage: list[UsageSums]
