"""The fallback for models that cannot run in batches: each sequence by itself, with the model's own cache.

Recurrent and hybrid models, and those that make attention themselves.  They run behind the same step loop, so
streaming, cancelling and sampling are the same; a step only costs as much as its sequences one after the other.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from serve.engine import gate
from serve.engine.scheduler import Batch, Chunk, Sequence
from serve.engine.survey import probe_tokens
from serve.errors import ModelLoadError

NUM_PROBE_TOKENS = 9
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers models call their cache, newest name first."""


@dataclass(slots=True)
class _State:
    """A sequence between two steps: the first ``num_tokens`` are in the cache, and these logits came after them."""

    cache: Any
    num_tokens: int
    logits: Tensor


class AloneForward:
    """Runs a transformers model sequence by sequence.  What a sequence keeps goes when the sequence goes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        self._takes_rows = "logits_to_keep" in parameters
        self._cache_name = next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])
        self._states: WeakKeyDictionary[Sequence, _State] = WeakKeyDictionary()

    def logits(self, batch: Batch) -> Tensor:
        """``[n, vocab_size]``: a row of each sampled sequence, then those that predict asked prompt tokens.

        A prompt runs in one piece, in the step that completes it.  When memory runs out half-way, what was computed
        is used by the next try.
        """
        asked = [chunk for chunk in batch.chunks if chunk.sequence.params.prompt_logprobs is not None]
        for_prompts = [self._predicting(chunk) for chunk in asked]
        rows = [*(self._advance(sequence) for sequence in batch.sampled), *for_prompts]
        return torch.cat(rows) if rows else torch.empty(0, 0)

    def _predicting(self, chunk: Chunk) -> Tensor:
        """The rows that predict a chunk of a prompt.  Everything before it runs again."""
        tokens = list(chunk.sequence.prompt_token_ids[: chunk.start + chunk.num_tokens])
        logits, cache = self._run(tokens, None, chunk.num_tokens)
        if chunk.completes_prompt:
            self._states[chunk.sequence] = _State(cache, len(tokens), logits[-1:])
        return logits[: len(chunk.predicted)]

    def _advance(self, sequence: Sequence) -> Tensor:
        tokens = [*sequence.prompt_token_ids, *sequence.output_token_ids]
        # Taken out until the pass succeeds: a pass that fails may leave a cache half-filled.
        state = self._states.pop(sequence, None)
        if state is None or state.num_tokens < len(tokens):
            is_next = state is not None and state.num_tokens == len(tokens) - 1
            logits, cache = self._run(tokens, state.cache if state and is_next else None)
            state = _State(cache, len(tokens), logits)
        self._states[sequence] = state
        return state.logits

    def _run(self, tokens: list[int], before: Any, num_rows: int = 1) -> tuple[Tensor, Any]:
        """Logits of the last ``num_rows`` tokens, and the cache: of all tokens, or of the last one after ``before``."""
        new = tokens if before is None else tokens[-1:]
        options: dict[str, Any] = {} if before is None else {self._cache_name: before}
        if self._takes_rows:
            options["logits_to_keep"] = num_rows
        out = self._model(input_ids=torch.tensor([new], device=self._model.device), use_cache=True, **options)
        cache = next((found for name in CACHE_NAMES if (found := out.get(name)) is not None), None)
        return out.logits[0, -num_rows:], cache

    def verify(self) -> int:
        """Compare a prompt and decoded tokens with one pass without a cache.

        Returns:
            Bytes that one more token takes in the model's cache.

        Raises:
            ModelLoadError: it has no cache, or its logits differ.
        """
        name = type(self._model).__name__
        tokens = probe_tokens(self._model.config.get_text_config().vocab_size, NUM_PROBE_TOKENS, 0)
        expected = gate.alone(self._model, tokens)
        start = NUM_PROBE_TOKENS - gate.NUM_DECODES
        got, num_bytes, cache = list[Tensor](), list[int](), None
        for end in range(start, NUM_PROBE_TOKENS + 1):
            logits, cache = self._run(tokens[:end], cache)
            got.append(logits)
            num_bytes.append(num_bytes_below(cache))
        if cache is None:
            raise ModelLoadError(f"{name} gives no cache away, so requests cannot take turns: it cannot be served")
        off_by = gate.off_by(expected[start - 1 :], torch.cat(got).float())
        if not off_by <= gate.TOLERANCE[self._model.dtype]:
            raise ModelLoadError(
                f"{name} gives other logits token by token than in one pass (off by {off_by:.2g} of their spread): "
                "this transformers cannot serve it"
            )
        return max(0, num_bytes[-1] - num_bytes[-2])


def num_bytes_below(kept: Any) -> int:
    """Bytes of all tensors below ``kept``."""
    seen: set[int] = set()

    def count(value: Any) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(count(item) for item in cast("dict[Any, Any]", value).values())
        if isinstance(value, list | tuple):
            return sum(count(item) for item in cast("list[Any]", value))
        return count(cast("dict[str, Any]", value.__dict__)) if hasattr(value, "__dict__") else 0

    return count(kept)
