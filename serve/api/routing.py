"""How bodies become values: strict JSON, parsed once, with the documented errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.responses import Response

from serve.errors import InvalidRequest, UnsupportedMediaType


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
            UnsupportedMediaType: it is not declared as JSON.
            InvalidRequest: it is not JSON.
        """
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not (
            media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))
        ):
            sent = media_type or "none"
            raise UnsupportedMediaType(f"the content type is {sent}; send Content-Type: application/json")
        try:
            self._parsed = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise InvalidRequest(f"the body is not valid JSON: {error}") from None


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
