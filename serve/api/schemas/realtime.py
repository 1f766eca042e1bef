"""What ``WebSocket /v1/realtime/chat`` carries besides chat completions' requests and chunks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from serve.api.schemas.common import ErrorBody


class Done(BaseModel):
    """From the server: the turn is complete."""

    type: Literal["done"] = "done"


class Cancelled(BaseModel):
    """From the server: the turn was given up, as asked."""

    type: Literal["cancelled"] = "cancelled"


class Pong(BaseModel):
    """From the server: the answer to a ping."""

    type: Literal["pong"] = "pong"


class ErrorEvent(BaseModel):
    """From the server: what a request over HTTP would have got, and whether the running turn is over."""

    type: Literal["error"] = "error"
    error: ErrorBody
    status: int
    ends_turn: bool


class Control(BaseModel):
    """From the client: end the running turn, or ask for a sign of life."""

    type: Literal["cancel", "ping"]
