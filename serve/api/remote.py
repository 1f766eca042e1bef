"""The gateway's routes: OpenAI's and Anthropic's, answered by a model elsewhere (``SERVE_ENGINE=remote``).

Keys, limits, health, playground and documentation stay this server's own; bodies pass through unread but for ``model``,
``stream`` and ``previous_response_id``.  What is not in :data:`POST_PATHS` or below has no route and gets 404.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, WebSocket
from starlette.responses import Response

from serve.api.errors import error_response
from serve.api.middleware import refuse_socket
from serve.api.relay import forward
from serve.api.response_owners import ResponseOwners
from serve.api.routing import StrictRoute
from serve.api.schemas.common import ErrorResponse
from serve.errors import ModelNotFound, ResponseNotFound, RouteNotOffered
from serve.observe import RequestRecord

RESPONSES = "/v1/responses"
POST_PATHS = (
    "/v1/chat/completions", "/v1/completions", RESPONSES, f"{RESPONSES}/input_tokens", f"{RESPONSES}/compact",
    "/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize",
)  # fmt: skip
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 502, 503)
}
_SANE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")

router = APIRouter(route_class=StrictRoute, tags=["gateway"], responses=_ERRORS)


async def _pass_on(body: dict[str, Any], request: Request) -> Response:
    """Answered by the remote model as its own documentation says; streamed with ``stream: true``."""
    record: RequestRecord = request.scope["trimaran.record"]
    path = request.url.path
    record.model = str(body["model"])[:200] if "model" in body else None
    record.is_stream = body.get("stream") is True
    watch = None
    if path.startswith(RESPONSES):
        owners, caller = _owners(request)
        owners.check_previous(caller, body.get("previous_response_id"))
        watch = owners.watch(caller) if path == RESPONSES else None
    return await forward(request, path, await request.body(), watch)


for _path in POST_PATHS:
    router.add_api_route(
        _path,
        _pass_on,
        methods=["POST"],
        response_model=None,
        name=_path.removeprefix("/v1").strip("/").replace("/", "_"),
        summary=f"Pass {_path} on",
    )


@router.get("/v1/models", response_model=None, summary="List the remote's models")
async def list_models(request: Request) -> Response:
    """The remote's models."""
    return await forward(request, "/v1/models")


@router.get("/v1/models/{model:path}", response_model=None, summary="Describe a remote model")
async def get_model(model: str, request: Request) -> Response:
    """One of the remote's models."""
    if not model or set(model.split("/")) & {"", ".", ".."}:
        raise ModelNotFound("this is no model's id", param="model")
    return await forward(request, "/v1/models/" + quote(model, safe="/"))


@router.get(RESPONSES + "/{response_id}", response_model=None, summary="Retrieve a response of the remote")
async def get_response(response_id: str, request: Request) -> Response:
    """A response that the remote has stored, to the caller who asked for it."""
    return await _on_stored(response_id, request)


@router.delete(RESPONSES + "/{response_id}", response_model=None, summary="Delete a response of the remote")
async def delete_response(response_id: str, request: Request) -> Response:
    """Have the remote forget a response."""
    return await _on_stored(response_id, request)


@router.post(RESPONSES + "/{response_id}/cancel", response_model=None, summary="Cancel a response of the remote")
async def cancel_response(response_id: str, request: Request) -> Response:
    """End a response that runs in the background at the remote."""
    return await _on_stored(response_id, request, "/cancel")


@router.get(RESPONSES + "/{response_id}/input_items", response_model=None, summary="List a response's input")
async def list_input_items(response_id: str, request: Request) -> Response:
    """The items that a response of the remote was asked with, page by page."""
    return await _on_stored(response_id, request, "/input_items")


async def _on_stored(response_id: str, request: Request, below: str = "") -> Response:
    if not _SANE_ID.fullmatch(response_id):
        raise ResponseNotFound(f"{response_id[:64]!r} is no response's id")
    owners, caller = _owners(request)
    owners.check(caller, response_id)
    request.scope["trimaran.record"].is_stream = request.query_params.get("stream") == "true"
    return await forward(request, f"{RESPONSES}/{response_id}{below}")


def _owners(request: Request) -> tuple[ResponseOwners, str]:
    record: RequestRecord = request.scope["trimaran.record"]
    return request.app.state.response_owners, record.caller or ""


@router.websocket("/v1/realtime/chat")
async def refuse_realtime(socket: WebSocket) -> None:
    """A WebSocket does not pass: neither RunPod's queue nor Modal's redirects could carry it."""
    error = RouteNotOffered(
        "a gateway passes no WebSockets on: POST /v1/chat/completions with stream: true, or connect to the model itself"
    )
    await refuse_socket(error_response(error), socket.scope, socket.receive, socket.send)
