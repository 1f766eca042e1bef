"""``GET /usage``: the usage records' sums, where they are kept in a database."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request

from serve.api.schemas.common import ErrorResponse
from serve.api.schemas.usage import UsageReport, UsageSums
from serve.background import in_background
from serve.records.reading import MAX_DAYS, first_day, read_sums
from serve.settings import Settings

router = APIRouter(tags=["health"])


@router.get(
    "/usage",
    summary="Who used what",
    responses={status: {"model": ErrorResponse} for status in (400, 401, 403, 503)},
)
async def get_usage(request: Request, days: Annotated[int, Query(ge=1, le=MAX_DAYS)] = 7) -> UsageReport:
    """Requests, tokens and estimated cost of each caller, model, route and day, today (UTC) and ``days - 1`` before."""
    settings: Settings = request.app.state.settings
    assert settings.records_url is not None  # noqa: S101 - else there is no such route
    since, names = first_day(days), ("caller", "model", "route", "day")
    (sums,) = await in_background(partial(read_sums, settings.records_url.get_secret_value(), since, [names]))
    return UsageReport(since=since, usage=[UsageSums(**entry) for entry in sums])
