"""How bodies become values: strict JSON, parsed once, with the documented errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.responses import Response

from serve.api.errors import show
from serve.errors import InvalidRequest, UnsupportedMediaType

MAX_VALUES = 50_000
"""Parsing and checking that many takes the event loop some 50 ms; a body of 8 MiB could hold 80 times as many."""


def _has_too_many_values(body: bytes) -> bool:
    """Count what separates and opens JSON values, before anything is parsed and without looking into strings."""
    if _count_marks(body) <= MAX_VALUES:
        return False
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 4 * MAX_VALUES:  # two quotes a string, two strings a value with its key
        return True
    return _count_marks(b"".join(plain.split(b'"')[::2])) > MAX_VALUES


def _count_marks(text: bytes) -> int:
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))


def parse_json(body: bytes) -> Any:
    """What a body says.

    Raises:
        InvalidRequest: it is not JSON, or too much of it.
    """
    if _has_too_many_values(body):
        raise InvalidRequest(f"the body has more than {MAX_VALUES} JSON values; send fewer, longer strings")
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None


class _JsonRequest(Request):
    """A request whose body is known to be JSON."""

    async def json(self) -> Any:
        """The body, parsed by pydantic's parser.

        It refuses what Python's would let through: lone surrogates, NaN, nesting of any depth.
        """
        return self._parsed

    async def parse(self) -> None:
        """Read and check the body.

        Raises:
            UnsupportedMediaType: it is not declared as JSON, or compressed.
            InvalidRequest: it is not JSON.
        """
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not (
            media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))
        ):
            sent = media_type or "none"
            raise UnsupportedMediaType(f"the content type is {sent}; send Content-Type: application/json")
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaType(f"the content encoding is {show(encoding)}; send the body as it is")
        self._parsed = parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route whose body, where it has one, is strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Parse before FastAPI does."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def strict(request: Request) -> Response:
            parsed = _JsonRequest(request.scope, request.receive)
            await parsed.parse()
            return await handler(parsed)

        return strict
