"""The engine's protocol: token ids in, token events out.  Knows no HTTP, JSON, pydantic or platform.

Torch-free: tests and the ``echo`` engine import this file alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from serve.engine.scheduler import Batch
from serve.errors import ContextLengthExceeded, InvalidRequest, ServeError
from serve.types import Batching, EngineStats, FinishReason, GenerationRequest, TokenEvent, TokenLogprob

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""

Phase = Callable[[str], AbstractContextManager[None]]
"""``with phase("weights"):`` times one part of a cold start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine needs to know of the settings.  ``None`` means: choose, and log value and reason."""

    device: str = "auto"
    dtype: str = "auto"
    max_batch_size: int | None = None
    max_model_len: int | None = None
    max_queue: int = 64
    prefill_chunk_tokens: int = 512
    itl_target_s: float = 0.2
    num_threads: int | None = None
    trust_remote_code: bool = False
    cache_dir: Path | None = None
    cuda_graphs: bool = True
    overlap: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model's files, complete and readable, and the parts of its tokenizer that the engine needs.

    ``max_model_len`` is the context in tokens that requests are validated against.  ``adapter`` is a LoRA
    folder to merge into ``folder``.  ``origin`` says where the weights were found, ``num_bytes`` their size.
    """

    folder: Path
    decode: Decode
    eos_token_ids: frozenset[int]
    max_model_len: int
    adapter: Path | None = None
    origin: str = ""
    num_bytes: int = 0


def check_vocabulary(request: GenerationRequest, vocab_size: int) -> None:
    """Refuse token ids that the model does not have, before they reach a tensor.

    Raises:
        InvalidRequest: names the field and the id.
    """
    params = request.params
    for name, token_ids in (
        ("logit_bias", [token_id for token_id, _ in params.logit_bias]),
        ("stop_token_ids", params.stop_token_ids),
        ("prompt", request.prompt_token_ids),
    ):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
            raise InvalidRequest(
                f"{name} holds the token id {wrong}, but this model's ids are 0 to {vocab_size - 1}", param=name
            )


def fitted(request: GenerationRequest, max_model_len: int, vocab_size: int) -> GenerationRequest:
    """The request with a limit that its slot can hold.

    Raises:
        ContextLengthExceeded: prompt and completion do not fit.
        InvalidRequest: a token id is outside the vocabulary.
    """
    check_vocabulary(request, vocab_size)
    num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    if num_prompt_tokens + (max_tokens or 1) > max_model_len:
        asked = f" and max_tokens is {max_tokens}" if max_tokens else ""
        message = f"the context is {max_model_len} tokens, but the prompt has {num_prompt_tokens}{asked}; shorten it"
        raise ContextLengthExceeded(message, param="messages")
    if max_tokens is not None:
        return request
    return replace(request, params=replace(request.params, max_tokens=max_model_len - num_prompt_tokens))


class TokenStream:
    """The events of one request, in order, on the event loop.

    Iterating yields *everything that has arrived* as one tuple, so that a busy server writes several tokens
    at once.  The last tuple's last event has a ``finish_reason``.  Leave early through :meth:`close`, which
    aborts the request; closing twice, or after the end, does nothing.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None], scope: str = "") -> None:
        self.request_id = request_id
        self.scope = scope
        self.has_started = False
        self.is_finished = False
        self._abort = abort
        self._events: list[TokenEvent] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        """Deliver one event.  Only called on the event loop; ignored after the end."""
        if self.is_finished:
            return
        self.has_started = True
        self.is_finished = event.finish_reason is not None
        self._events.append(event)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def fail(self, error: ServeError) -> None:
        """End the stream with ``error`` and abort the request."""
        if not self.is_finished:
            self.put(TokenEvent(finish_reason=FinishReason.ERROR, error=error))
            self._abort(self.request_id)

    def close(self) -> None:
        """Nobody reads any more: the engine drops the request before its next step."""
        if not self.is_finished:
            self.is_finished = True
            self._abort(self.request_id)

    async def next(self) -> tuple[TokenEvent, ...]:
        """Wait for at least one event; empty after the last one.  One reader at a time."""
        if not self._events:
            if self.is_finished:
                return ()
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        events, self._events = tuple(self._events), []
        return events

    async def __aiter__(self) -> AsyncIterator[tuple[TokenEvent, ...]]:
        while events := await self.next():
            yield events


class Engine(Protocol):
    """What ``serve.lifecycle`` and ``serve.api`` may ask of an engine.

    ``prepare`` and ``load`` block and run in one thread; every other method is called on the event loop.
    """

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and completion together; ``None`` before ``load``."""
        ...

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below this; ``None`` before ``load``."""
        ...

    @property
    def batching(self) -> Batching | None:
        """Whether requests run in one batch; ``None`` before ``load``."""
        ...

    def prepare(self, files: ModelFiles, phase: Phase) -> None:
        """What of ``load`` can be done before a memory snapshot is taken: imports, and weights in main memory.

        Optional; ``load`` goes on from there.  Touches no GPU, leaves no file open or mapped and no thread behind.

        Raises:
            ModelLoadError: with the reason and the remedy.
        """
        ...

    def load(self, files: ModelFiles, phase: Phase) -> None:
        """Bring the model up, warmed.

        Raises:
            ModelLoadError: with the reason and the remedy.
        """
        ...

    def reseed(self) -> None:
        """Take a random state of its own, after ``load``: the process is one of several from one snapshot."""
        ...

    def start(self, on_death: Callable[[ServeError], None]) -> None:
        """Begin stepping; requests that were submitted before now begin to run."""
        ...

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request, also while the model is loading.

        Raises:
            QueueFull: every slot is taken and ``max_queue`` requests wait.
        """
        ...

    def fail_waiting(self, error: ServeError) -> None:
        """End every request that has no slot yet."""
        ...

    def fail_all(self, error: ServeError) -> None:
        """End every request."""
        ...

    def stats(self) -> EngineStats:
        """Load at this moment."""
        ...

    async def close(self) -> None:
        """Stop stepping and release the model."""
        ...


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step gave.  Rows are those of ``batch.sampled``.

    ``token_ids`` holds None where a row failed: ``errors`` says why, or else its logits were not finite.
    ``logprobs`` has the rows that asked for them; ``prompt_logprobs``, by index in ``batch.chunks``, those of the
    prompt tokens that the chunk's positions predict.
    """

    token_ids: list[int | None]
    errors: Mapping[int, ServeError] = field(default_factory=dict[int, ServeError])
    logprobs: Mapping[int, TokenLogprob] = field(default_factory=dict[int, TokenLogprob])
    prompt_logprobs: Mapping[int, Sequence[TokenLogprob]] = field(default_factory=dict[int, Sequence[TokenLogprob]])


class Runner(Protocol):
    """Computes one step.  All tensors live behind this."""

    @property
    def num_slots(self) -> int:
        """Sequences that fit in the KV cache, known after ``load``."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens that fit in one slot, known after ``load``."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width of the logits, known after ``load``."""
        ...

    @property
    def alone_reason(self) -> str | None:
        """Why sequences run one after the other; None when they run as one batch.  Known after ``load``."""
        ...

    def prepare(self, files: ModelFiles, phase: Phase) -> None:
        """As :meth:`Engine.prepare`."""
        ...

    @property
    def keeps_prefixes(self) -> bool:
        """Whether what a sequence computed stays in its slot, for others that begin alike, until it is overwritten."""
        ...

    def load(self, files: ModelFiles, phase: Phase) -> None:
        """Bring the model up, warmed.  Raises ``ModelLoadError``."""
        ...

    def reseed(self) -> None:
        """As :meth:`Engine.reseed`."""
        ...

    def settle(self) -> None:
        """What makes later steps quicker, but can wait until nobody waits.  Called once, between two steps."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the one before it was read.  Known after ``load``."""
        ...

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        """Begin a step; the result waits for its end and gives one token for each of ``batch.sampled``.

        Where ``overlaps``, some sequences may have a pending token: one that the last launched step draws.

        Raises:
            OutOfMemory: nothing of this step counts.
        """
        ...
