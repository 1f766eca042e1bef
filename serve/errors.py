"""The exceptions that Trimaran raises on purpose.

    ServeError                       message, code, param=None, retry_after=None
    ├─ ConfigError                   exit status 2, before the port is bound
    ├─ RequestError                  the caller can fix it
    │  ├─ InvalidRequest  ├─ UnsupportedParameter  ├─ ContextLengthExceeded
    │  ├─ AuthenticationError  ├─ PermissionDenied  ├─ ModelNotFound
    │  ├─ ResponseNotFound  ├─ PreviousResponseNotFound  ├─ RouteNotOffered
    │  └─ RequestTooLarge  └─ RequestTimeout  └─ UnsupportedMediaType
    ├─ CapacityError                 try again later; always with retry_after
    │  ├─ QueueFull  ├─ RateLimited  ├─ EngineNotReady  ├─ ShuttingDown  ├─ DeadlineExceeded
    │  ├─ IssuerUnavailable  └─ RecordsUnavailable
    └─ EngineError                   our fault
       ├─ GenerationFailed           this request only; the engine lives
       ├─ OutOfMemory                this request only; the engine lives
       ├─ UpstreamFailed             this request only; a gateway's remote failed
       ├─ ModelLoadError             exit status 3
       │  └─ HubUnreachable          no network, or no copy on this machine
       └─ EngineDead                 exit status 70, so that the platform replaces the process

These classes carry no HTTP status: ``serve.api.errors`` holds the only table.  Standard library only.
"""

from __future__ import annotations

from typing import ClassVar


class ServeError(Exception):
    """The root: a message for a person, a stable ``code`` for a program.

    Args:
        message: What is wrong and what to do about it.
        param: The request field or setting at fault, such as ``messages[0].content``.
        retry_after: Seconds after which the same request may succeed.
    """

    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class ConfigError(ServeError):
    """A setting is wrong; nothing was started."""

    code = "config_error"
    exit_status: ClassVar[int] = 2


class RequestError(ServeError):
    """The caller can fix it."""


class InvalidRequest(RequestError):
    """Malformed JSON, a wrong type, a value out of range."""


class UnsupportedParameter(RequestError):
    """A known field that this server does not implement (yet)."""

    code = "unsupported_parameter"


class ContextLengthExceeded(RequestError):
    """Prompt and requested completion do not fit; the message says both numbers."""

    code = "context_length_exceeded"


class AuthenticationError(RequestError):
    """No key, or a wrong one."""

    code = "invalid_api_key"


class PermissionDenied(RequestError):
    """A valid key without the right to do this."""

    code = "permission_denied"


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"


class ResponseNotFound(RequestError):
    """The path names a response that is not stored for this caller (any more)."""


class RouteNotOffered(RequestError):
    """The path is known, but the server behind this gateway has nothing there, or the gateway cannot reach it."""

    code = "route_not_offered"


class PreviousResponseNotFound(RequestError):
    """``previous_response_id`` names a response that is not stored for this caller (any more)."""

    code = "previous_response_not_found"


class RequestTooLarge(RequestError):
    """The body exceeds ``SERVE_MAX_BODY_BYTES``."""

    code = "request_too_large"


class RequestTimeout(RequestError):
    """The body did not arrive in time."""

    code = "request_timeout"


class UnsupportedMediaType(RequestError):
    """The body is not declared as JSON."""

    code = "unsupported_media_type"


class CapacityError(ServeError):
    """Try again later: ``retry_after`` is always set."""

    def __init__(self, message: str, *, param: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, param=param, retry_after=retry_after)


class QueueFull(CapacityError):
    """Every slot is taken and the waiting queue is full."""

    code = "rate_limit_exceeded"


class RateLimited(CapacityError):
    """This caller has used up its allowance."""

    code = "rate_limit_exceeded"


class EngineNotReady(CapacityError):
    """The model is still loading."""

    code = "engine_not_ready"


class ShuttingDown(CapacityError):
    """The server is draining and admits nothing new."""

    code = "shutting_down"


class DeadlineExceeded(CapacityError):
    """The request did not finish in the time it was given."""

    code = "deadline_exceeded"


class IssuerUnavailable(CapacityError):
    """The issuer of a token does not tell its keys now, so that nobody knows whether the token is good."""

    code = "issuer_unavailable"


class RecordsUnavailable(CapacityError):
    """The database of usage records does not answer, or holds none yet."""

    code = "records_unavailable"


class EngineError(ServeError):
    """Our fault, not the caller's."""


class GenerationFailed(EngineError):
    """This request's logits were not finite; its neighbours are unharmed."""

    code = "generation_failed"


class OutOfMemory(EngineError):
    """The device ran out of memory for this request; the engine lives."""

    code = "out_of_memory"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float = 5.0) -> None:
        super().__init__(message, param=param, retry_after=retry_after)


class ModelLoadError(EngineError):
    """The model cannot be served; the message says why and what would."""

    code = "model_load_error"
    exit_status: ClassVar[int] = 3


class HubUnreachable(ModelLoadError):
    """Nobody answers for the Hub; nothing is known about the model."""


class UpstreamFailed(EngineError):
    """The model behind this gateway broke off or refuses the gateway."""

    code = "upstream_failed"


class EngineDead(EngineError):
    """The step loop ended with an exception; the process must be replaced."""

    code = "engine_dead"
    exit_status: ClassVar[int] = 70
