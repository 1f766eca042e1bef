"""What a request changes in its own logits before drawing: penalties, bias, tokens too early to end it, grammar."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serve.engine.live import GRAMMAR_FAILED
from serve.engine.sequence import Sequence
from serve.engine.transfer import Drawn, on_device
from serve.errors import GenerationFailed, RequestError, ServeError

logger = logging.getLogger(__name__)

NEGATIVE_INFINITY = float("-inf")
WORD_BITS = 32


@dataclass(slots=True, eq=False)
class _State:
    """What is kept of one sequence from step to step, on the device."""

    counts: Tensor | None = None
    """``[vocab_size]``, float32: how often each token was generated."""
    seen: Tensor | None = None
    """``[vocab_size]``: whether a token is in the prompt or was generated."""
    num_counted: int = 0
    bias: tuple[Tensor, Tensor] | None = None
    """Token ids, and what is added to their logits."""
    ends: Tensor | None = None
    """Ids of the tokens that end the sequence."""


@dataclass(slots=True)
class LogitChanges:
    """Changes rows of logits in place, each by its own sequence."""

    device: torch.device
    errors: dict[int, ServeError] = field(default_factory=dict[int, ServeError])
    """By row of the last call: why no token can follow."""

    def apply(self, logits: Tensor, sequences: Seq[Sequence], drawn: Drawn) -> None:
        """Change ``logits`` (``[num_sequences, vocab_size]``, float32), in the order that ``SamplingParams`` names.

        ``drawn`` holds what is pending.  A grammar's sequence has nothing pending: its mask depends on its last token.
        """
        self.errors = {}
        self._penalize(logits, sequences, drawn)
        for row, sequence in enumerate(sequences):
            if sequence.params.logit_bias:
                token_ids, values = self._bias(sequence)
                logits[row].index_add_(0, token_ids, values)
            if sequence.awaits_min_tokens and sequence.grammar is None and sequence.end_token_ids:
                logits[row].index_fill_(0, self._ends(sequence), NEGATIVE_INFINITY)
        self._constrain(logits, sequences)

    def _penalize(self, logits: Tensor, sequences: Seq[Sequence], drawn: Drawn) -> None:
        rows = [row for row, sequence in enumerate(sequences) if sequence.params.has_penalties]
        if not rows:
            return
        params = [sequences[row].params for row in rows]
        states = [self._count(sequences[row], logits.shape[1], drawn) for row in rows]
        at = on_device(rows, self.device)
        changed = logits[at]
        if any(p.repetition_penalty != 1.0 for p in params):
            factor = self._column([p.repetition_penalty for p in params])
            seen = torch.stack([state.seen for state in states if state.seen is not None])
            changed = torch.where(seen, torch.where(changed > 0, changed / factor, changed * factor), changed)
        if any(p.frequency_penalty or p.presence_penalty for p in params):
            counts = torch.stack([state.counts for state in states if state.counts is not None])
            changed -= self._column([p.frequency_penalty for p in params]) * counts
            changed -= self._column([p.presence_penalty for p in params]) * (counts > 0)
        logits[at] = changed

    def _count(self, sequence: Sequence, vocab_size: int, drawn: Drawn) -> _State:
        """The sequence's counts, brought up to its last token."""
        state = _state(sequence)
        if state.counts is None or state.seen is None:
            state.counts = torch.zeros(vocab_size, device=self.device)
            state.seen = torch.zeros(vocab_size, device=self.device, dtype=torch.bool)
            state.seen.index_fill_(0, on_device(sequence.prompt_token_ids, self.device), True)
        if new := sequence.output_token_ids[state.num_counted :]:
            _add(state.counts, state.seen, on_device(new, self.device))
            state.num_counted += len(new)
        if sequence.num_pending_tokens:
            _add(state.counts, state.seen, drawn.of(sequence))
            state.num_counted += 1
        return state

    def _bias(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        state = _state(sequence)
        if state.bias is None:
            token_ids, values = zip(*sequence.params.logit_bias, strict=True)
            state.bias = on_device(token_ids, self.device), self._column(values)[:, 0]
        return state.bias

    def _ends(self, sequence: Sequence) -> Tensor:
        state = _state(sequence)
        if state.ends is None:
            state.ends = on_device(sorted(sequence.end_token_ids), self.device)
        return state.ends

    def _constrain(self, logits: Tensor, sequences: Seq[Sequence]) -> None:
        rows: list[int] = []
        masks: list[bytes] = []
        num_bytes = -(-logits.shape[1] // WORD_BITS) * WORD_BITS // 8
        for row, sequence in enumerate(sequences):
            if sequence.grammar is None:
                continue
            try:
                allowed = _allowed(sequence, num_bytes)
            except RequestError as error:  # the caller asked for what cannot be done
                self.errors[row] = error
                continue
            except Exception as error:
                logger.error("The grammar of request %s failed: %s", sequence.request.request_id, type(error).__name__)
                self.errors[row] = GenerationFailed(GRAMMAR_FAILED)
                continue
            rows.append(row)
            masks.append(allowed)
        if not rows:
            return
        words = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.int32).view(len(rows), -1).to(self.device)
        bits = torch.arange(WORD_BITS, device=self.device, dtype=torch.int32)
        is_forbidden = ((words[:, :, None] >> bits) & 1 == 0).flatten(1)[:, : logits.shape[1]]
        if len(rows) == len(sequences):
            logits.masked_fill_(is_forbidden, NEGATIVE_INFINITY)
        else:
            logits[rows] = logits[rows].masked_fill_(is_forbidden, NEGATIVE_INFINITY)

    def _column(self, values: Seq[float]) -> Tensor:
        return on_device(values, self.device, torch.float32)[:, None]


def _add(counts: Tensor, seen: Tensor, token_ids: Tensor) -> None:
    counts.index_add_(0, token_ids, torch.ones_like(token_ids, dtype=counts.dtype))
    seen.index_fill_(0, token_ids, True)


def _state(sequence: Sequence) -> _State:
    if sequence.sampler_state is None:
        sequence.sampler_state = _State()
    return sequence.sampler_state


def _allowed(sequence: Sequence, num_bytes: int) -> bytes:
    """The grammar's mask, as many bytes as the vocabulary needs; after its end only what ends the sequence."""
    grammar = sequence.grammar
    if grammar is None or not grammar.is_finished:
        mask = grammar.allowed() if grammar else b""
        return mask[:num_bytes].ljust(num_bytes, b"\0")
    return sum(1 << token_id for token_id in sequence.end_token_ids).to_bytes(num_bytes, "little")
