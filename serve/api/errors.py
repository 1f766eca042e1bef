"""Exceptions to HTTP: the only table of statuses, and OpenAI's error body for all but Anthropic's routes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve import errors
from serve.api.schemas.common import ErrorBody, ErrorResponse
from serve.api.schemas.message_events import ErrorKind, MessageErrorBody, MessageErrorResponse
from serve.errors import InvalidRequest, ServeError, UnsupportedParameter
from serve.observe import RequestRecord

INVALID, SERVER, BUSY = "invalid_request_error", "server_error", "service_unavailable_error"

TABLE: dict[type[ServeError], tuple[int, str]] = {
    errors.InvalidRequest: (400, INVALID),
    errors.UnsupportedParameter: (400, INVALID),
    errors.ContextLengthExceeded: (400, INVALID),
    errors.AuthenticationError: (401, "authentication_error"),
    errors.PermissionDenied: (403, "permission_error"),
    errors.ModelNotFound: (404, INVALID),
    errors.ResponseNotFound: (404, INVALID),
    errors.RouteNotOffered: (404, INVALID),
    errors.PreviousResponseNotFound: (400, INVALID),
    errors.RequestTooLarge: (413, INVALID),
    errors.RequestTimeout: (408, INVALID),
    errors.UnsupportedMediaType: (415, INVALID),
    errors.QueueFull: (429, "rate_limit_error"),
    errors.RateLimited: (429, "rate_limit_error"),
    errors.GenerationFailed: (500, SERVER),
    errors.UpstreamFailed: (502, SERVER),
    errors.EngineNotReady: (503, BUSY),
    errors.ShuttingDown: (503, BUSY),
    errors.IssuerUnavailable: (503, BUSY),
    errors.RecordsUnavailable: (503, BUSY),
    errors.OutOfMemory: (503, BUSY),
    errors.ConfigError: (503, SERVER),
    errors.ModelLoadError: (503, SERVER),
    errors.HubUnreachable: (503, SERVER),
    errors.EngineDead: (503, SERVER),
    errors.DeadlineExceeded: (504, BUSY),
}

MESSAGES = "/v1/messages"
MESSAGE_ERRORS: dict[int, ErrorKind] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's types by status; any other below 500 is a caller's mistake, and from there on ours."""

MAX_SHOWN, MAX_NAME = 60, 100
"""Characters of a wrong value, and of a field's name, that an error repeats."""

CUSTOM = "custom"
"""The kind of tools that OpenAI has besides functions."""

NO_OBJECT = {"model_type", "model_attributes_type", "dict_type"}
"""Where an object was wanted, in pydantic's words."""

WRONG_LENGTHS = ("too_long", "too_short")
"""Of lists: the member of a union that says so found nothing else wrong."""

Scope = Mapping[str, Any]


def status_of(error: ServeError) -> int:
    """The HTTP status of an error."""
    return TABLE[type(error)][0]


def status_of_body(error: Mapping[str, Any]) -> int:
    """The HTTP status of an error object in a stream, by its code or else Anthropic's type; 500 for neither."""
    code, kind = error.get("code"), error.get("type")
    of_code = (status for known, (status, _) in TABLE.items() if code is not None and known.code == code)
    return next(of_code, None) or next((status for status, name in MESSAGE_ERRORS.items() if name == kind), 500)


def error_body(error: ServeError) -> ErrorBody:
    """What OpenAI's error object holds."""
    return ErrorBody(message=error.message, type=TABLE[type(error)][1], param=error.param, code=error.code)


def error_json(error: ServeError) -> bytes:
    """OpenAI's error object, encoded."""
    return to_json(ErrorResponse(error=error_body(error)))


def message_error_json(status: int, message: str, request_id: str | None) -> bytes:
    """Anthropic's error object, encoded."""
    body = MessageErrorBody(type=MESSAGE_ERRORS.get(status, INVALID if status < 500 else "api_error"), message=message)
    return to_json(MessageErrorResponse(error=body, request_id=request_id))


def speaks_anthropic(path: str) -> bool:
    """Whether the clients of a path read Anthropic's errors."""
    return path == MESSAGES or path.startswith(MESSAGES + "/")


def error_response(error: ServeError, scope: Scope | None = None) -> Response:
    """The answer to a request that failed before its first byte, in the form that its path's clients read."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return _response(status_of(error), error_body(error), headers, scope)


def plain_error(
    status: int, message: str, headers: Mapping[str, str] | None = None, scope: Scope | None = None
) -> Response:
    """The same body for what has no class of its own: unknown paths, wrong methods, bugs."""
    kind = SERVER if status >= 500 else INVALID
    return _response(status, ErrorBody(message=message, type=kind, param=None, code=None), dict(headers or {}), scope)


def _response(status: int, body: ErrorBody, headers: dict[str, str], scope: Scope | None) -> Response:
    if scope is not None and speaks_anthropic(scope["path"]):
        record: RequestRecord | None = scope.get("trimaran.record")
        content = message_error_json(status, body.message, record.request_id if record else None)
    else:
        content = to_json(ErrorResponse(error=body))
    return Response(content, status, headers, "application/json")


def install_handlers(app: FastAPI) -> None:
    """Answer every exception that a route raises on purpose."""
    app.add_exception_handler(ServeError, _on_serve_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)  # noqa: S101 - as registered
    record = request.scope.get("trimaran.record")
    if record is not None:
        record.error_code = error.code
    return error_response(error, request.scope)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as registered
    return error_response(explain(error.errors(), error.body), request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - as registered
    path, headers = request.url.path, error.headers
    if error.status_code == 404:
        message = f"unknown path {show(path)}; see /docs for what there is"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed on {show(path)}"
        if allowed := allowed_methods(request):
            message, headers = f"{message}; send {' or '.join(allowed)}", {"Allow": ", ".join(allowed)}
    else:
        message = str(error.detail)
    return plain_error(error.status_code, message, headers, request.scope)


def allowed_methods(request: Request) -> list[str]:
    """Those of all routes on the path that a request found; HEAD goes wherever GET does."""
    path = getattr(request.scope.get("route"), "path", None)
    found: set[str] = {
        method for route in all_routes(request.app.routes) if route.path == path for method in route.methods or ()
    }
    return sorted(found | {"HEAD"} if "GET" in found else found)


def all_routes(routes: Sequence[Any]) -> Iterator[APIRoute]:
    """All of an app's, those of included routers too."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        if (inner := getattr(route, "original_router", None)) is not None:
            yield from all_routes(inner.routes)


def show(value: Any) -> str:
    """A wrong value as an error repeats it: short, whatever was sent."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def explain(problems: Sequence[Any], body: Any) -> InvalidRequest | UnsupportedParameter:
    """The most specific of a validation's problems: which field, which value, what it should be."""
    path, problem = max(
        ((_path(problem, body), problem) for problem in problems),
        key=lambda pair: (pair[1]["type"] in WRONG_LENGTHS, len(pair[0]), _is_of_the_right_kind(pair[1])),
    )
    name = _dotted(path)
    if problem["type"] in {"missing", "union_tag_not_found"}:
        return InvalidRequest(f"{name} is missing; it is required", param=name or None)
    tag = problem["ctx"]["tag"] if problem["type"] == "union_tag_invalid" else problem.get("input")
    if tag == CUSTOM and path[-1] == "type" and path[0] in {"tools", "tool_choice", "messages"}:
        return UnsupportedParameter(f"{name} is {CUSTOM}, but this server has functions only", param=name)
    if problem["type"] == "union_tag_invalid":
        return InvalidRequest(f"{name}: there are {problem['ctx']['expected_tags']}, not {show(tag)}", param=name)
    shown = show(problem.get("input"))
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] in NO_OBJECT:
        message = "input should be an object"
    message = f"{name or 'the body'}: {message[:1].lower()}{message[1:]}"
    return InvalidRequest(message if ", not " in message else f"{message}, not {shown}", param=name or None)


def _is_of_the_right_kind(problem: Any) -> bool:
    """Whether this member of a union at least wanted the kind of value that came: its words help most."""
    value: Any = problem.get("input")
    kind = "string" if isinstance(value, str) else "list" if isinstance(value, list) else "dict"
    return not str(problem["type"]).endswith("_type") or str(problem["type"]).startswith(kind)


def _path(problem: Any, body: Any) -> list[str | int]:
    """The problem's place in the body, without pydantic's names of union members; of a wrong kind, its ``type``."""
    if problem["loc"][0] != "body":  # a parameter of the query, or of the path
        return list(problem["loc"])[1:]
    path: list[str | int] = []
    here: Any = body
    places = list(problem["loc"])[1:]  # the first is "body"
    for place in places:
        if (isinstance(here, dict) and place in here) or (isinstance(here, list) and isinstance(place, int)):
            here = here[place] if isinstance(here, dict) or place < len(here) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            path.append(place)
        elif problem["type"] == "missing" and place is places[-1]:
            path.append(place)
    return [*path, "type"] if problem["type"] in {"union_tag_not_found", "union_tag_invalid"} else path


def _dotted(path: Sequence[str | int]) -> str:
    text = ""
    for place in path:
        text += f"[{place}]" if isinstance(place, int) else f".{place[:MAX_NAME]}" if text else place[:MAX_NAME]
    return text
