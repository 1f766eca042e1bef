"""Wire bodies that several routes share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """What went wrong.  ``param`` names the field, ``code`` is for programs; both may be null."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error of every route."""

    error: ErrorBody


class Batching(BaseModel):
    """Whether requests are computed together.  If not, ``reason`` says why, and they take turns token by token."""

    enabled: bool
    reason: str | None


class Model(BaseModel):
    """One served model.

    ``max_model_len`` is null until the model's configuration is read, ``batching`` until its weights are loaded.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int | None
    batching: Batching | None


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether the process lives, and what it is doing."""

    status: Literal["loading", "ready", "draining", "dead"]
    phase: str | None
    message: str | None = None


class WeightsRead(BaseModel):
    """Where the weights were found (``local``, ``cache`` or ``hub``), and their size."""

    source: str
    bytes: int


class Version(BaseModel):
    """What runs here, and how long each part of its cold start took, in seconds.

    ``uptime_s`` counts from the birth of the process, or from its restore; ``weights`` is null until they are found.
    """

    version: str
    model: str
    engine: str
    status: Literal["loading", "ready", "draining", "dead"]
    phases: dict[str, float]
    uptime_s: float
    weights: WeightsRead | None
    batching: Batching | None
