"""The sequences of one request: submitted together, read as one stream of events, given up together."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from starlette.types import Receive

from serve.api.deadline import at_deadline
from serve.api.schemas.sampling import MAX_CHOICES
from serve.api.schemas.wire import INT64_MAX
from serve.engine.base import TokenStream
from serve.errors import InvalidRequest, ServeError
from serve.lifecycle import Lifecycle
from serve.observe import RequestRecord
from serve.types import FinishReason, GenerationRequest, SamplingParams, TokenEvent

IndexedEvent = tuple[int, TokenEvent]
"""A choice's index, and what happened to it."""


class Choices:
    """The events of a request's choices, in the order in which they happened, while the request's record is kept.

    Args:
        streams: One for each choice, by index.
        record: The request's.
    """

    def __init__(self, streams: Sequence[TokenStream], record: RequestRecord) -> None:
        self._streams = streams
        self._record = record
        self._pending: dict[asyncio.Task[tuple[TokenEvent, ...]], int] = {}
        self._is_open = [True] * len(streams)
        self._deadline = at_deadline(record, self._fail)

    def __len__(self) -> int:
        return len(self._streams)

    async def next(self) -> list[IndexedEvent]:
        """All events that have arrived; empty after the last."""
        if len(self._streams) == 1:
            events = [(0, event) for event in await self._streams[0].next()]
        else:
            events = await self._next_of_several()
        for _, event in events:
            self._note(event)
        return events

    async def _next_of_several(self) -> list[IndexedEvent]:
        for index, stream in enumerate(self._streams):
            if self._is_open[index] and index not in self._pending.values():
                self._pending[asyncio.ensure_future(stream.next())] = index
        if not self._pending:
            return []
        # A cancelled wait leaves the tasks as they are: nothing that arrived is lost.
        done, _ = await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)
        events: list[IndexedEvent] = []
        for index, task in sorted((self._pending.pop(task), task) for task in done):
            arrived = task.result()
            self._is_open[index] = bool(arrived) and arrived[-1].finish_reason is None
            events += [(index, event) for event in arrived]
        return events

    def _note(self, event: TokenEvent) -> None:
        record = self._record
        if record.queue_s is None:
            record.queue_s = event.queue_s
        if event.token_id is not None:
            record.saw_tokens(1)
        if event.finish_reason is not None:
            record.finish_reason = event.finish_reason.value
        if event.usage is not None:
            record.cached_tokens += event.usage.cached_tokens
        if event.error is not None:
            record.error_code = event.error.code

    def _fail(self, error: ServeError) -> None:
        for stream in self._streams:
            stream.fail(error)

    def close(self) -> None:
        """Nobody reads any more: what still runs is aborted before the engine's next step."""
        if self._deadline is not None:
            self._deadline.cancel()
        for task in self._pending:
            task.cancel()
        if not all(stream.is_finished for stream in self._streams):
            self._record.finish_reason = FinishReason.ABORT.value
        for stream in self._streams:
            stream.close()


def submit(
    lifecycle: Lifecycle, prompts: Sequence[tuple[int, ...]], params: SamplingParams, n: int, record: RequestRecord
) -> Choices:
    """Queue ``n`` sequences for each prompt: choice ``i * n + j`` is the ``j``-th of prompt ``i``.

    Raises:
        InvalidRequest: more sequences than may ever run and wait at once.
        CapacityError: not all of them can be queued now, or the request's time is over; then none is.
        EngineError: the model cannot be served.
    """
    _check_number(len(prompts), n, lifecycle.capacity)
    record.prompt_tokens = sum(len(prompt) for prompt in prompts)
    streams: list[TokenStream] = []
    queued_at = time.perf_counter()  # before the engine can begin with any
    try:
        for prompt in prompts:
            for at in range(n):
                request = GenerationRequest(
                    request_id=uuid.uuid4().hex,
                    prompt_token_ids=prompt,
                    params=_of_choice(params, at),
                    cache_scope=record.caller or "",
                )
                streams.append(lifecycle.submit(request, record.received_at))
        choices = Choices(streams, record)
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    record.begin_work(len(streams), queued_at)
    return choices


def _check_number(num_prompts: int, n: int, capacity: int | None) -> None:
    most = min(MAX_CHOICES, capacity or MAX_CHOICES)
    if num_prompts * n > most:
        asked = f"n is {n}" if num_prompts == 1 else f"{num_prompts} prompts with n = {n} ask for {num_prompts * n}"
        raise InvalidRequest(
            f"{asked}, but this server takes at most {most} choices in one request",
            param="n" if num_prompts == 1 else "prompt",
        )


def _of_choice(params: SamplingParams, at: int) -> SamplingParams:
    """Choices of one seed differ from each other, and are the same again with the same seed."""
    if params.seed is None or at == 0:
        return params
    seed = params.seed + at
    return replace(params, seed=seed if seed <= INT64_MAX else seed - 2 * (INT64_MAX + 1))


class Answer(Protocol):
    """Folds a request's events into the whole answer of one wire."""

    def add(self, index: int, event: TokenEvent) -> None:
        """Take the next event of a choice; it carries no error."""
        ...


async def fold(choices: Choices, answer: Answer) -> None:
    """Read a request to its end.

    Raises:
        ServeError: a choice failed, and with it the request.
    """
    while events := await choices.next():
        for index, event in events:
            if event.error is not None:
                raise event.error
            answer.add(index, event)


async def fold_unless_gone(choices: Choices, answer: Answer, receive: Receive) -> bool:
    """:func:`fold`, given up when the client closes the connection: then False, and the request is aborted."""
    folding = asyncio.create_task(fold(choices, answer))
    leaving = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait({folding, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if folding.done():
            await folding
        return folding.done()
    finally:
        folding.cancel()
        leaving.cancel()
        choices.close()


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
