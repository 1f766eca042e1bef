"""The health family: one state, told in each platform's dialect.  Never waits for anything."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from serve.api.schemas.common import Batching, ErrorResponse, Health, Version, WeightsRead
from serve.lifecycle import RETRY_AFTER_LOADING_S, Lifecycle, State
from serve.metrics import CONTENT_TYPE, Metrics
from serve.settings import Settings
from serve.watchdog import Watchdog

router = APIRouter(tags=["health"])


def _health(request: Request) -> Health:
    lifecycle: Lifecycle = request.app.state.lifecycle
    message = lifecycle.failure.message if lifecycle.failure else None
    return Health(status=lifecycle.state.value, phase=lifecycle.current_phase, message=message)


@router.get("/health", summary="Live?", response_model=Health, responses={503: {"model": Health}})
async def health(request: Request) -> Response:
    """200 while the process can do its work, now or after loading; 503 when it must be replaced."""
    body = _health(request)
    return JSONResponse(body.model_dump(), 503 if body.status == State.DEAD else 200)


@router.get("/ready", summary="Ready?", response_model=Health, responses={503: {"model": Health}})
async def ready(request: Request) -> Response:
    """200 when requests are answered at once, an idle engine having to prove it with a token; else 503."""
    body = _health(request)
    watchdog: Watchdog = request.app.state.watchdog
    if body.status == State.READY and watchdog.is_answering():
        return JSONResponse(body.model_dump())
    headers = {"retry-after": str(int(RETRY_AFTER_LOADING_S))}
    return JSONResponse(body.model_dump(), 503, headers)


@router.get(
    "/ping", summary="RunPod's and SageMaker's health check", responses={204: {}, 503: {}}, response_class=Response
)
async def ping(request: Request) -> Response:
    """200 ready, 204 loading, 503 otherwise; no body."""
    state: State = request.app.state.lifecycle.state
    return Response(status_code={State.READY: 200, State.LOADING: 204}.get(state, 503))


@router.get(
    "/version",
    summary="What runs here",
    responses={401: {"model": ErrorResponse}},
)
async def get_version(request: Request) -> Version:
    """Version, model, and the seconds that each phase of the cold start took."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    settings: Settings = request.app.state.settings
    found = lifecycle.cold_start.weights
    return Version(
        version=package_version(),
        model=settings.served_name,
        engine=settings.engine.value,
        status=lifecycle.state.value,
        phases=dict(lifecycle.phases),
        uptime_s=round(lifecycle.cold_start.age_s(), 3),
        weights=WeightsRead(source=found[0], bytes=found[1]) if found else None,
        batching=batching(lifecycle),
    )


@router.get(
    "/metrics",
    summary="For Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, 401: {"model": ErrorResponse}},
)
async def get_metrics(request: Request) -> Response:
    """Counters, histograms and gauges in Prometheus' text format."""
    metrics: Metrics = request.app.state.metrics
    return Response(await metrics.text(), media_type=CONTENT_TYPE)


def batching(lifecycle: Lifecycle) -> Batching | None:
    """How the engine computes requests; None while it loads."""
    known = lifecycle.engine.batching
    return Batching(enabled=known.enabled, reason=known.reason) if known else None


@cache
def package_version() -> str:
    """The installed distribution's version."""
    try:
        return version("trimaran")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
