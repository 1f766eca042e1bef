"""``GET /v1/models``: what is served here."""

from __future__ import annotations

from fastapi import APIRouter, Request

from serve.api.auth import DOCUMENTED_SCHEMES
from serve.api.errors import show
from serve.api.health import batching
from serve.api.schemas.common import ErrorResponse, Model, ModelList
from serve.errors import ModelNotFound
from serve.lifecycle import Lifecycle
from serve.settings import Settings

router = APIRouter(tags=["models"], dependencies=DOCUMENTED_SCHEMES)


def check_model(name: str, settings: Settings) -> None:
    """Raise ``ModelNotFound`` unless ``name`` is served here; the message names what is."""
    if name != settings.served_name:
        raise ModelNotFound(f"model {show(name)} is not served here; use {settings.served_name!r}", param="model")


def _model(request: Request) -> Model:
    lifecycle: Lifecycle = request.app.state.lifecycle
    settings: Settings = request.app.state.settings
    return Model(
        id=settings.served_name,
        created=int(lifecycle.started_at),
        owned_by="trimaran",
        max_model_len=lifecycle.max_model_len,
        batching=batching(lifecycle),
    )


@router.get("/v1/models", summary="List models", responses={401: {"model": ErrorResponse}})
async def list_models(request: Request) -> ModelList:
    """The one model that this server has; known from the first second, also while it loads."""
    return ModelList(data=[_model(request)])


@router.get(
    "/v1/models/{model:path}",
    summary="Describe a model",
    responses={401: {"model": ErrorResponse}, 404: {"model": ErrorResponse}},
)
async def get_model(model: str, request: Request) -> Model:
    """One model by its id, which may contain slashes."""
    check_model(model, request.app.state.settings)
    return _model(request)
