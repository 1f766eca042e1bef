"""``GET /v1/models``: what is served here."""

from __future__ import annotations

from fastapi import APIRouter, Request

from serve.api.errors import show
from serve.api.health import batching
from serve.api.schemas.common import ErrorResponse, Model, ModelList
from serve.errors import ModelNotFound
from serve.lifecycle import Lifecycle
from serve.settings import Settings

router = APIRouter(tags=["models"])


def check_model(name: str, settings: Settings) -> None:
    """Raise ``ModelNotFound`` unless ``name`` is served here; the message names what is."""
    if name != settings.served_name:
        raise _not_found(name, settings)


def _not_found(name: str, settings: Settings) -> ModelNotFound:
    return ModelNotFound(f"model {show(name)} is not served here; use {settings.served_name!r}", param="model")


def _models(request: Request) -> list[Model]:
    lifecycle: Lifecycle = request.app.state.lifecycle
    settings: Settings = request.app.state.settings
    created = int(lifecycle.started_at)
    model = Model(
        id=settings.served_name,
        created=created,
        owned_by="trimaran",
        max_model_len=lifecycle.max_model_len,
        batching=batching(lifecycle),
    )
    second = lifecycle.embeddings
    if second is None:
        return [model]
    length = second.max_tokens
    return [model, Model(id=second.name, created=created, owned_by="trimaran", max_model_len=length, batching=None)]


@router.get("/v1/models", summary="List models", responses={401: {"model": ErrorResponse}})
async def list_models(request: Request) -> ModelList:
    """What this server has: its model and, where there is one, that for embeddings; known while they load, too."""
    return ModelList(data=_models(request))


@router.get(
    "/v1/models/{model:path}",
    summary="Describe a model",
    responses={401: {"model": ErrorResponse}, 404: {"model": ErrorResponse}},
)
async def get_model(model: str, request: Request) -> Model:
    """One model by its id, which may contain slashes."""
    found = next((known for known in _models(request) if known.id == model), None)
    if found is None:
        raise _not_found(model, request.app.state.settings)
    return found
