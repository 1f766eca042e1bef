"""``POST /invocations``: the one route of SageMaker's containers, answered by the route that the body is for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.routing import StrictRoute
from serve.api.schemas.common import ErrorResponse
from serve.api.sse import EVENT_STREAM
from serve.errors import InvalidRequest
from serve.settings import EngineName, Settings

CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings",
)  # fmt: skip

router = APIRouter(route_class=StrictRoute, tags=["sagemaker"])


@router.post(
    "/invocations",
    response_model=None,
    responses={
        200: {"content": {"application/json": {"schema": {"type": "object"}}, **EVENT_STREAM}},
        **{status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 500, 503)},
    },
    summary="SageMaker's route to chat, completions, responses and embeddings",
)
async def invocations(body: dict[str, Any], request: Request) -> Response:
    """Answered as the body's own route does.

    `messages` is a chat completion, `prompt` a completion, `input` a response, or an embedding where `model` names that
    model.  `model` may be left out.
    """
    settings: Settings = request.app.state.settings
    path = _path(body, settings)
    if "model" not in body and settings.engine is not EngineName.REMOTE:
        body = {**body, "model": settings.served_name}
    return _Elsewhere(request.app.router, path, to_json(body), request.receive)


def _path(body: dict[str, Any], settings: Settings) -> str:
    found = [name for name in ("messages", "prompt", "input") if name in body]
    if len(found) != 1:
        given = " and ".join(found) or "none"
        raise InvalidRequest(f"the body has {given} of messages, prompt and input; send exactly one", param=None)
    if found == ["input"]:
        is_embedding = settings.embedding_model and body.get("model") == settings.embedding_name
        return EMBEDDINGS if is_embedding else RESPONSES
    return CHAT if found == ["messages"] else COMPLETIONS


class _Elsewhere(Response):
    """The answer of another route of the same app to the same request with ``body``."""

    def __init__(self, app: ASGIApp, path: str, body: bytes, receive: Receive) -> None:
        super().__init__()
        self._app, self._path, self._sent, self._receive = app, path, body, receive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the route answer; its client can still leave."""
        del receive
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return await self._receive()
            is_read = True
            return {"type": "http.request", "body": self._sent, "more_body": False}

        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        there: Scope = {
            **scope,
            "path": self._path,
            "raw_path": self._path.encode(),
            "headers": headers,
            "path_params": {},
        }
        await self._app(there, replay, send)
