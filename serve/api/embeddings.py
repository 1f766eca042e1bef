"""``POST /v1/embeddings``: texts to vectors, by a second model."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import time
from collections.abc import Sequence
from typing import cast

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from serve.api.deadline import before_deadline
from serve.api.errors import show
from serve.api.fields import check_extras
from serve.api.routing import StrictRoute
from serve.api.schemas.common import ErrorResponse
from serve.api.schemas.embeddings import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from serve.embedding import Embeddings
from serve.errors import ModelNotFound
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord
from serve.settings import Settings

router = APIRouter(route_class=StrictRoute, tags=["embeddings"])


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingList,
    responses={status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 500, 503)},
    summary="Embed texts",
)
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """One vector for each text.  Needs ``SERVE_EMBEDDING_MODEL``; without it every model is unknown here."""
    settings: Settings = request.app.state.settings
    lifecycle: Lifecycle = request.app.state.lifecycle
    record: RequestRecord = request.scope["trimaran.record"]
    embeddings = _model(body.model, lifecycle, settings)
    headers = check_extras(body, settings)
    record.model = embeddings.name
    lifecycle.check_admission()
    await embeddings.wait(lifecycle.patience_s(record.received_at))
    lifecycle.check_admission()
    if not embeddings.is_loaded:
        raise lifecycle.not_ready()
    record.begin_work(1, time.perf_counter())
    async with before_deadline(record):
        vectors, num_tokens = await embeddings.embed(_inputs(body), body.dimensions)
    record.prompt_tokens = num_tokens
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    answer = EmbeddingList(data=[], model=embeddings.name, usage=usage)
    # In a thread, vector by vector: a large answer has a million numbers.
    data = await asyncio.to_thread(_encode, vectors, body)
    return Response(to_json(answer).replace(b"[]", data, 1), headers=headers, media_type="application/json")


def _model(name: str, lifecycle: Lifecycle, settings: Settings) -> Embeddings:
    if lifecycle.embeddings is None:
        raise ModelNotFound(
            "no embedding model is served here; the operator can set SERVE_EMBEDDING_MODEL", param="model"
        )
    if name != lifecycle.embeddings.name:
        known = settings.embedding_name
        raise ModelNotFound(f"model {show(name)} makes no embeddings here; use {known!r}", param="model")
    return lifecycle.embeddings


def _inputs(body: EmbeddingRequest) -> Sequence[str | Sequence[int]]:
    given = body.input
    if isinstance(given, str):
        return [given]
    return [cast("list[int]", given)] if isinstance(given[0], int) else cast("Sequence[str | list[int]]", given)


def _encode(vectors: Sequence[bytes], body: EmbeddingRequest) -> bytes:
    """The JSON array of the vectors, cut to the wanted size."""
    parts: list[bytes] = []
    for index, vector in enumerate(vectors):
        numbers = _cut(vector, body.dimensions)
        if body.encoding_format == "base64":
            parts.append(to_json(Embedding(index=index, embedding=base64.b64encode(numbers).decode())))
        else:
            parts.append(
                to_json(Embedding(index=index, embedding=list(struct.unpack(f"<{len(numbers) // 4}f", numbers))))
            )
    return b"[" + b",".join(parts) + b"]"


def _cut(vector: bytes, dimensions: int | None) -> bytes:
    """The first numbers, as long as the whole vector was."""
    if dimensions is None or 4 * dimensions >= len(vector):
        return vector
    whole = struct.unpack(f"<{len(vector) // 4}f", vector)
    kept = whole[:dimensions]
    scale = math.hypot(*whole) / (math.hypot(*kept) or 1.0)
    return struct.pack(f"<{dimensions}f", *(number * scale for number in kept))
