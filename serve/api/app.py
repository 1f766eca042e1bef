"""The app: settings and an engine in, ASGI out.  A composition root; there is no app at module level."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware

from serve.api import (
    chat,
    completions,
    embeddings,
    health,
    invocations,
    messages,
    models,
    pages,
    realtime,
    responses,
    tokenize,
)
from serve.api.auth import OIDC, OPEN_PATHS, SCHEMES, Door, oidc_scheme, security
from serve.api.cors import cors
from serve.api.errors import install_handlers
from serve.api.limits import Limits
from serve.api.middleware import BodyLimit, Boundary, Gate
from serve.api.response_store import ResponseStore
from serve.api.sse import WritePace
from serve.background import in_background
from serve.embedding import Embeddings
from serve.engine.base import Engine
from serve.errors import ConfigError
from serve.keys import KeyRing, environment_key
from serve.lifecycle import Lifecycle
from serve.limits import Limiter
from serve.machine_time import MachineTime
from serve.metrics import Metrics
from serve.observe import RequestRecord
from serve.settings import EngineName, Settings, load_settings
from serve.sharing.limiter import SharedLimiter
from serve.source import choose_origin
from serve.watchdog import Watchdog

if TYPE_CHECKING:
    from serve.oidc import TokenVerifier
    from serve.records.writer import RecordWriter, TellSpent
    from serve.sharing.store import LimitStore
    from serve.traces import Traces

logger = logging.getLogger(__name__)

KEYS_CHECKED_S = 2.0
"""How often the file of keys is looked at."""


def create_engine(settings: Settings) -> Engine:
    """The engine that ``SERVE_ENGINE`` names.  Imports torch no earlier than its ``load``."""
    if settings.engine is EngineName.ECHO:
        from serve.engine.echo import EchoEngine  # noqa: PLC0415

        return EchoEngine(settings.engine_config())
    if settings.engine is EngineName.REMOTE:
        from serve.passage import PassageEngine  # noqa: PLC0415

        return PassageEngine(settings.engine_config())
    from serve.engine.runner import TransformersEngine  # noqa: PLC0415

    return TransformersEngine(settings.engine_config())


class _App(FastAPI):
    """FastAPI whose OpenAPI document tells the truth: our errors, never 422; scopes; the issuer of tokens."""

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            components, door = document["components"], cast("Door", self.state.door)
            components["securitySchemes"] = {**SCHEMES}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if path not in OPEN_PATHS:
                        operation["security"] = security(path, door)
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            if door.tokens is not None:
                components["securitySchemes"][OIDC] = oidc_scheme(door.tokens.discovery_url)
        return super().openapi()


def create_lifecycle(settings: Settings, engine: Engine | None = None) -> Lifecycle:
    """The model's life, not yet begun, for those who load it in two stages around a memory snapshot.

    Args:
        settings: The container's.
        engine: Replaces the one that the settings name.

    Raises:
        ConfigError: the model's name is malformed, or the chat template cannot be read.
    """
    has_embeddings = settings.embedding_model and settings.engine is not EngineName.REMOTE
    second = Embeddings(settings) if has_embeddings else None
    return Lifecycle(settings, engine or create_engine(settings), choose_origin(settings), second)


def create_app(
    settings: Settings | None = None, engine: Engine | None = None, lifecycle: Lifecycle | None = None
) -> FastAPI:
    """An app that loads its model when it starts.

    Args:
        settings: The environment's, if left out.
        engine: Replaces the one that the settings name.
        lifecycle: One that is loaded already (:meth:`Lifecycle.restored`), with these settings.

    Raises:
        ConfigError: the environment is wrong, or asks for what its engine cannot do.
    """
    settings = settings or load_settings()
    lifecycle = lifecycle or create_lifecycle(settings, engine)
    watchdog = _watchdog(settings, lifecycle)
    records = _record_writer(settings)
    limiter = _limiter(settings)
    metrics = Metrics(lifecycle, watchdog, records, limiter if isinstance(limiter, SharedLimiter) else None)
    traces = _traces(settings)
    sinks = [RequestRecord.log, metrics.observe, *(sink.put for sink in (records, traces) if sink)]
    machine, door = MachineTime(settings.usd_per_hour), Door(_key_ring(settings), _token_verifier(settings))
    app = _App(
        title="Trimaran",
        version=health.package_version(),
        summary="An OpenAI-compatible server for one Hugging Face model.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        generate_unique_id_function=_operation_id,
        middleware=[
            *cors(settings.cors_origins),
            Middleware(Boundary, sinks=sinks, machine=machine, deadline_s=settings.request_deadline_s),
            Middleware(Gate, door=door, only_local_names=not settings.allow_anonymous),
            Middleware(Limits, limiter=limiter),
            Middleware(BodyLimit, max_bytes=settings.max_body_bytes),
        ],
    )
    app.state.settings = settings
    app.state.lifecycle = lifecycle
    app.state.pace = WritePace(settings.stream_writes_per_s)
    app.state.watchdog, app.state.metrics, app.state.limiter = watchdog, metrics, limiter
    app.state.records, app.state.traces, app.state.door = records, traces, door
    app.state.responses = ResponseStore(settings.stored_responses, settings.stored_response_bytes)
    install_handlers(app)
    for router in (*_model_routers(app, settings), invocations.router, *_operator_routers(settings)):
        app.include_router(router)
    pages.mount_assets(app)
    return app


def _model_routers(app: FastAPI, settings: Settings) -> tuple[APIRouter, ...]:
    """The routes that a model answers: the one here, or a gateway's remote one."""
    if settings.engine is not EngineName.REMOTE:
        modules = (chat, completions, responses, messages, tokenize, embeddings, realtime, models)
        return tuple(module.router for module in modules)
    if settings.allowance().counts_work:
        raise ConfigError(
            "SERVE_LIMIT_TOKENS_PER_MINUTE, SERVE_LIMIT_TOKENS_PER_DAY and SERVE_LIMIT_USD_PER_DAY need an engine: a "
            "gateway does not see the tokens that pass through it; set them on the server at SERVE_REMOTE_URL"
        )
    from serve.api import remote  # noqa: PLC0415
    from serve.api.response_owners import ResponseOwners  # noqa: PLC0415
    from serve.upstream import connect  # noqa: PLC0415

    key = settings.remote_api_key.get_secret_value() if settings.remote_api_key else ""
    app.state.upstream = connect(settings.remote_url, key, settings.remote_timeout_s)
    has_one_caller = len(settings.api_keys) < 2 and not (settings.api_keys_file or settings.oidc_issuer)
    app.state.response_owners = ResponseOwners(keeps_apart=not has_one_caller)
    return (remote.router,)


def _watchdog(settings: Settings, lifecycle: Lifecycle) -> Watchdog:
    second = lifecycle.embeddings
    others = {"embedding model": lambda: second.batch_age_s} if second is not None else None
    return Watchdog(lifecycle.engine, settings.step_timeout_s, lifecycle.fail, others)


def _traces(settings: Settings) -> Traces | None:
    """Who sends spans; None: nobody."""
    if not settings.traces_url:
        return None
    from serve.traces import Traces  # noqa: PLC0415

    return Traces(settings.traces_url)


def _key_ring(settings: Settings) -> KeyRing:
    fixed = [environment_key(key.get_secret_value()) for key in settings.api_keys]
    return KeyRing(fixed, settings.api_keys_file)


def _token_verifier(settings: Settings) -> TokenVerifier | None:
    """Who verifies JWTs; None: there is no issuer."""
    if not settings.oidc_issuer:
        return None
    from serve.oidc import TokenVerifier  # noqa: PLC0415

    algorithms, leeway_s = settings.oidc_algorithms, settings.oidc_leeway_s
    return TokenVerifier(settings.oidc_issuer, settings.oidc_audience, algorithms, leeway_s)


async def _watch_keys(keys: KeyRing) -> None:
    """Take what changes in the file of keys, for as long as the app lives."""
    while True:
        await asyncio.sleep(KEYS_CHECKED_S)
        try:
            await in_background(keys.refresh)
        except Exception:  # no thread to be had, for example: a revoked key must not count for ever because of that
            logger.exception("The file of keys could not be looked at; it will be again")


def _operator_routers(settings: Settings) -> tuple[APIRouter, ...]:
    """The routes for whoever runs the server."""
    if settings.records_url is None:
        return health.router, pages.router
    from serve.api import usage  # noqa: PLC0415

    return health.router, usage.router, pages.router


def _record_writer(settings: Settings) -> RecordWriter | None:
    """Who writes usage records into a database; None: only the log has them."""
    if settings.records_url is None:
        return None
    from serve.records.writer import RecordWriter  # noqa: PLC0415

    return RecordWriter(settings.records_url.get_secret_value(), settings.records_buffer)


def _limiter(settings: Settings) -> Limiter:
    """Who counts what callers use: this process alone, or all replicas together."""
    allowance, url = settings.allowance(), settings.records_url
    if not settings.limits_shared or url is None or allowance.is_unlimited:
        return Limiter(allowance)

    def open_store() -> LimitStore:
        from serve.records.limit_table import LimitTable  # noqa: PLC0415

        return LimitTable(url.get_secret_value(), allowance)

    return SharedLimiter(allowance, open_store)


def _recall_into(limiter: Limiter) -> TellSpent | None:
    """Tells the limiter, from any thread, what callers used today before this process began; None: nothing asks."""
    if not limiter.needs_recall:
        return None
    limiter.expect_recall()
    return partial(asyncio.get_running_loop().call_soon_threadsafe, limiter.recall)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncGenerator[None]:
    lifecycle: Lifecycle = app.state.lifecycle
    watchdog: Watchdog = app.state.watchdog
    records: RecordWriter | None = app.state.records
    traces: Traces | None = app.state.traces
    limiter: Limiter = app.state.limiter
    lifecycle.start()
    watchdog.start()
    if records is not None:
        records.start(_recall_into(limiter))
    if isinstance(limiter, SharedLimiter):
        limiter.link.start()
    if traces is not None:
        traces.start()
    watching = asyncio.create_task(_watch_keys(app.state.door.keys)) if app.state.settings.api_keys_file else None
    yield
    watchdog.stop()
    if watching is not None:
        watching.cancel()
    # Whoever runs the app may have drained it already (serve.server does); then this returns at once.
    await lifecycle.drain(0.0 if lifecycle.is_drained else app.state.settings.drain_timeout_s)
    await lifecycle.close()
    if (upstream := getattr(app.state, "upstream", None)) is not None:
        await upstream.close()
    # Together, so that what a platform waits for after SIGTERM is enough for all.
    link = limiter.link if isinstance(limiter, SharedLimiter) else None
    await asyncio.gather(*(sink.close() for sink in (records, traces, link) if sink))


def _operation_id(route: APIRoute) -> str:
    return route.name
