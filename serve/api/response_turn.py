"""One turn of the Responses API: the response that its request begins, where it is kept, and how it runs alone."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import to_json

from serve.api.errors import status_of
from serve.api.generation import Choices, fold
from serve.api.middleware import CLIENT_CLOSED
from serve.api.response_items import listed
from serve.api.response_store import ResponseStore, RunningResponse, StoredResponse
from serve.api.responses_input import own_items
from serve.api.responses_shape import ResponseAnswer
from serve.api.schemas.response_resource import Response, ResponseReasoning, ResponseTool
from serve.api.schemas.responses import Item, ResponsesRequest, ToolChoice
from serve.errors import GenerationFailed, ServeError
from serve.observe import RequestRecord
from serve.types import SamplingParams

logger = logging.getLogger(__name__)

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


class ResponseTurn:
    """What becomes of one request.

    Args:
        body: The request.
        params: How its tokens are chosen.
        model: The served name.
        store: Where responses are kept.
        caller: For whom.
        previous: The response that the request goes on from.
    """

    def __init__(
        self,
        body: ResponsesRequest,
        params: SamplingParams,
        model: str,
        store: ResponseStore,
        caller: str,
        previous: StoredResponse | None,
    ) -> None:
        self._store = store
        self._caller = caller
        self._previous = previous
        self._items: Sequence[Item] = own_items(body)
        self._input_items = listed(self._items)
        self._is_kept = body.store is not False and store.keeps_any
        self.begun = _begun(body, params, model, is_stored=self._is_kept)
        """The response before its first token."""

    def keep(self, response: Response) -> None:
        """Store a response that has ended, where it is to be stored."""
        if not self._is_kept:
            return
        before, size = (self._previous.history, self._previous.num_bytes) if self._previous else ((), 0)
        output = _ITEMS.validate_python([item.model_dump() for item in response.output])
        num_bytes = size + len(to_json(response)) + len(to_json(self._input_items))
        history = (*before, *self._items, *output)
        self._store.put(self._caller, StoredResponse(response, self._input_items, history, num_bytes))

    def run_in_background(
        self,
        answer: ResponseAnswer,
        choices: Choices,
        record: RequestRecord,
        on_end: Callable[[RequestRecord], object],
    ) -> None:
        """Go on without a connection; the store tells how far it is, and ends it.

        ``on_end`` is called with ``record``, which is the turn's own.
        """
        task = asyncio.create_task(_run(answer, choices, record, on_end))

        def cancel() -> Response:
            task.cancel()
            return answer.cancel()

        self._store.start(self._caller, self.begun.id, RunningResponse(answer.body, self._input_items, cancel))


async def _run(
    answer: ResponseAnswer, choices: Choices, record: RequestRecord, on_end: Callable[[RequestRecord], object]
) -> None:
    try:
        await fold(choices, answer)
        record.status = 200
    except ServeError as error:
        record.status, record.error_code = status_of(error), error.code
        answer.fail(error)
    except Exception:
        logger.exception("Unexpected error in the background of request %s", record.request_id)
        record.status = 500
        answer.fail(GenerationFailed("internal error"))
    finally:
        choices.close()
        if record.status is None:  # cancelled
            record.status = CLIENT_CLOSED
        on_end(record)


def _begun(body: ResponsesRequest, params: SamplingParams, model: str, *, is_stored: bool) -> Response:
    text, reasoning = body.text, body.reasoning
    return Response(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=ResponseReasoning(
            effort=reasoning.effort if reasoning else None, summary=reasoning.summary if reasoning else None
        ),
        safety_identifier=body.safety_identifier,
        store=is_stored,
        background=bool(body.background),
        temperature=params.temperature,
        text={"format": _format(body), "verbosity": (text.verbosity if text else None) or "medium"},
        tool_choice=_choice(body),
        tools=[
            ResponseTool(
                name=tool.name or "", description=tool.description, parameters=tool.parameters, strict=tool.strict
            )
            for tool in body.tools or ()
        ],
        top_logprobs=body.top_logprobs or 0,
        top_p=params.top_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        user=body.user,
        metadata=body.metadata or {},
    )


def _format(body: ResponsesRequest) -> dict[str, Any]:
    wanted = body.text.format if body.text else None
    if wanted is None or wanted.type != "json_schema":
        return {"type": wanted.type if wanted else "text"}
    return {
        "type": wanted.type,
        "name": wanted.name,
        "description": wanted.description,
        "schema": wanted.schema_,
        "strict": bool(wanted.strict),
    }


def _choice(body: ResponsesRequest) -> str | dict[str, Any]:
    if isinstance(body.tool_choice, ToolChoice):
        return body.tool_choice.model_dump(exclude_none=True)
    return body.tool_choice or "auto"
