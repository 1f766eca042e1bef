"""``/v1/responses``: OpenAI's Responses API, and Open Responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve.api.chat_plan import chat_prompt
from serve.api.fields import check_fields
from serve.api.generation import fold_unless_gone
from serve.api.limits import Admission
from serve.api.middleware import CLIENT_CLOSED
from serve.api.models import check_model
from serve.api.response_items import page
from serve.api.response_store import ResponseStore, RunningResponse, StoredResponse
from serve.api.response_turn import ResponseTurn
from serve.api.responses_input import NAMES, chat_fields
from serve.api.responses_shape import ResponseAnswer, ResponseShape
from serve.api.routing import StrictRoute
from serve.api.sampling import sampling_params
from serve.api.schemas.common import ErrorResponse
from serve.api.schemas.response_resource import DeletedResponse, InputTokens, ItemList
from serve.api.schemas.response_resource import Response as ResponseResource
from serve.api.schemas.responses import ResponsesRequest
from serve.api.sse import EVENT_STREAM, EventStream, event_frames
from serve.api.translation import start_turn, to_chat
from serve.errors import InvalidRequest, UnsupportedParameter
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord
from serve.settings import Settings


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


router = APIRouter(route_class=StrictRoute, tags=["responses"])


@router.post(
    "/v1/responses",
    response_model=ResponseResource,
    responses={
        200: {"content": EVENT_STREAM},
        **_errors(400, 401, 404, 413, 415, 429, 500, 503),
    },
    summary="Create a response",
)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Generate a response: one JSON object, or server-sent events with ``stream: true``."""
    settings: Settings = request.app.state.settings
    lifecycle: Lifecycle = request.app.state.lifecycle
    store = _store(request)
    record: RequestRecord = request.scope["trimaran.record"]
    check_model(body.model, settings)
    headers = check_fields(body, settings)
    _check_background(body, store)
    record.model, record.is_stream = settings.served_name, bool(body.stream)
    previous = _previous(body, request)
    fields = chat_fields(body, previous.history if previous else ())
    with NAMES.applied():
        chat = to_chat(fields)
        params = sampling_params(chat, None, lifecycle)
        if body.background:  # it goes on when this request has ended
            record = replace(record, endpoint=record.route)
        choices, reader = await start_turn(chat, lifecycle, record)
    turn = ResponseTurn(body, params, settings.served_name, store, _caller(request), previous)
    answer = ResponseAnswer(turn.begun, reader, turn.keep)
    if body.background:
        turn.run_in_background(answer, choices, record, _background_end(request))
        request.scope["trimaran.record"].goes_on = True
        return _json(answer.body(), headers)
    if body.stream:
        frames = event_frames(choices, ResponseShape(answer), settings.keep_alive_s, request.app.state.pace)
        return EventStream(frames, headers, choices.close)
    if not await fold_unless_gone(choices, answer, request.receive):
        return Response(status_code=CLIENT_CLOSED)
    return _json(answer.body(), headers)


def _previous(body: ResponsesRequest, request: Request) -> StoredResponse | None:
    if body.previous_response_id is None:
        return None
    return _store(request).previous(_caller(request), body.previous_response_id)


def _check_background(body: ResponsesRequest, store: ResponseStore) -> None:
    if not body.background:
        return
    if body.stream:
        raise UnsupportedParameter(
            "background does not go with stream: true; ask for the response by its id", param="background"
        )
    if body.store is False or not store.keeps_any:
        raise InvalidRequest("background needs a stored response; leave store out", param="background")


@router.post(
    "/v1/responses/input_tokens",
    responses=_errors(400, 401, 404, 413, 415, 429, 500, 503),
    summary="Count a response's input tokens",
)
async def count_input_tokens(body: ResponsesRequest, request: Request, response: Response) -> InputTokens:
    """The tokens of the prompt that the same fields would make for a response."""
    settings: Settings = request.app.state.settings
    record: RequestRecord = request.scope["trimaran.record"]
    check_model(body.model, settings)
    response.headers.update(check_fields(body, settings))
    record.model = settings.served_name
    previous = _previous(body, request)
    fields = chat_fields(body, previous.history if previous else ())
    with NAMES.applied():
        prompt = await chat_prompt(to_chat(fields), request.app.state.lifecycle, record.received_at)
    return InputTokens(input_tokens=len(prompt))


@router.post("/v1/responses/compact", include_in_schema=False)
async def compact_response() -> Response:
    """Not offered.  The path would else be that of a response, where POST is not allowed."""
    raise HTTPException(404)


@router.get(
    "/v1/responses/{response_id}",
    responses=_errors(400, 401, 404),
    summary="Retrieve a response",
)
async def get_response(
    response_id: str,
    request: Request,
    include: Annotated[list[str] | None, Query(description="Has no effect.")] = None,
    stream: Annotated[bool, Query(description="Stored responses are not streamed again.")] = False,
) -> ResponseResource:
    """A stored response, whole, or as far as it has come in the background."""
    del include
    if stream:
        raise UnsupportedParameter("stream: stored responses are not streamed again; leave it out", param="stream")
    found = _store(request).get(_caller(request), response_id)
    return found.body() if isinstance(found, RunningResponse) else found.response


@router.delete("/v1/responses/{response_id}", responses=_errors(401, 404), summary="Delete a response")
async def delete_response(response_id: str, request: Request) -> DeletedResponse:
    """Forget a stored response; those that went on from it keep what they know."""
    _store(request).delete(_caller(request), response_id)
    return DeletedResponse(id=response_id)


@router.post("/v1/responses/{response_id}/cancel", responses=_errors(400, 401, 404), summary="Cancel a response")
async def cancel_response(response_id: str, request: Request) -> ResponseResource:
    """End a response that runs in the background; one that has ended stays as it is."""
    found = _store(request).get(_caller(request), response_id)
    if isinstance(found, RunningResponse):
        return found.cancel()
    if not found.response.background:
        raise InvalidRequest("only a response with background: true can be cancelled; to end another, disconnect")
    return found.response


@router.get(
    "/v1/responses/{response_id}/input_items", responses=_errors(400, 401, 404), summary="List a response's input"
)
async def list_input_items(
    response_id: str,
    request: Request,
    after: Annotated[str | None, Query(description="The id of the last item that is known.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="1 to 100. Default: 20.")] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="desc begins with the last item.")] = "desc",
    include: Annotated[list[str] | None, Query(description="Has no effect.")] = None,
) -> ItemList:
    """The items that the request itself had, page by page."""
    del include
    found = _store(request).get(_caller(request), response_id)
    return page(found.input_items, after, limit, order)


def _background_end(request: Request) -> Callable[[RequestRecord], None]:
    """What is called with the final record; until then the caller's allowance counts the request as running."""
    admission: Admission | None = request.scope.get("trimaran.admission")
    release = admission.outlive() if admission else None

    def end(record: RequestRecord) -> None:
        request.scope["trimaran.end"](record)
        if release is not None:
            release(record)

    return end


def _store(request: Request) -> ResponseStore:
    return request.app.state.responses


def _caller(request: Request) -> str:
    return request.scope["trimaran.record"].caller or ""


def _json(body: ResponseResource, headers: dict[str, str]) -> Response:
    return Response(to_json(body), headers=headers, media_type="application/json")
