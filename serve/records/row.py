"""One usage record: what is kept of a request, and of which ones.  Standard library only."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from serve.observe import RequestRecord

MAX_TEXT = 200
SWITCHED = 101


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """A row of the table ``usage``.  Times are UTC; no text of a prompt or an answer is in it.

    ``id`` is made here: writing a row again changes nothing, and callers may repeat their request ids.
    ``route`` is the route as declared; ``machine_ms`` the request's share of the machine's time.
    """

    id: str
    day: date
    received_at: datetime
    request_id: str
    caller: str
    method: str
    route: str
    model: str | None
    status: int
    error_code: str | None
    finish_reason: str | None
    is_stream: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_ms: float | None
    ttft_ms: float | None
    total_ms: float
    machine_ms: float | None
    cost_usd: float | None


def usage_row(record: RequestRecord) -> UsageRow | None:
    """What is kept of a request that has ended; None for what is no usage.

    Kept is what an accepted caller asked the server to do: each POST, each turn on a WebSocket.  Reading is free, and
    who has no key could otherwise fill the database.
    """
    if record.caller is None or record.method in {"GET", "HEAD", "OPTIONS"} or record.status in {None, SWITCHED}:
        return None
    received_at = datetime.now(UTC) - timedelta(seconds=record.age_s)
    return UsageRow(
        id=uuid.uuid4().hex,
        day=received_at.date(),
        received_at=received_at,
        request_id=_text(record.request_id),
        caller=_text(record.caller),
        method=_text(record.method),
        route=_text(record.endpoint or "unknown"),
        model=_text(record.model) if record.model is not None else None,
        status=record.status or 0,
        error_code=record.error_code,
        finish_reason=record.finish_reason,
        is_stream=record.is_stream,
        prompt_tokens=record.prompt_tokens or 0,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.completion_tokens,
        queue_ms=_ms(record.queue_s),
        ttft_ms=_ms(record.ttft_s),
        total_ms=_ms(record.age_s) or 0.0,
        machine_ms=_ms(record.machine_s),
        cost_usd=record.cost_usd,
    )


def _text(value: str) -> str:
    """As every database takes it: callers choose some of these, and PostgreSQL refuses NUL and lone surrogates."""
    return value[:MAX_TEXT].replace("\0", "").encode(errors="replace").decode()


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
