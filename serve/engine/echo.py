"""An engine without a model: the completion is the prompt.  Deterministic, torch-free, for tests and smoke deploys.

It runs behind the real queue, scheduler, detokenizer and step loop; only the arithmetic is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from serve.engine.base import EngineConfig, ModelFiles, Phase, StepOutput
from serve.engine.scheduler import Batch, Sequence
from serve.engine.worker import StepEngine
from serve.types import MIN_LOGPROB, TokenLogprob

EOS_TOKEN_ID = 256
VOCAB_SIZE = 257
MAX_MODEL_LEN = 8192
NUM_SLOTS = 8
_BY_URGE_TO_END = (EOS_TOKEN_ID, *b'}]"0', *range(33, EOS_TOKEN_ID), *range(33))
"""What a grammar asks for instead of the prompt's next byte: what closes JSON comes first."""

CHAT_TEMPLATE = "{{ messages[-1]['content'] }}"


def encode(text: str) -> list[int]:
    """One token for each byte of UTF-8, so that most characters outside ASCII span several tokens."""
    return list(text.encode("utf-8", errors="replace"))


def decode(token_ids: Seq[int]) -> str:
    """The inverse of :func:`encode`; special tokens are left out."""
    return bytes(token_id for token_id in token_ids if token_id < EOS_TOKEN_ID).decode("utf-8", errors="replace")


class EchoRunner:
    """Repeats the prompt token by token, then ends the sequence."""

    vocab_size = VOCAB_SIZE
    alone_reason: str | None = None
    keeps_prefixes = False
    overlaps = False

    def __init__(self, config: EngineConfig, *, step_s: float = 0.0, load_s: float = 0.0) -> None:
        self.num_slots = config.max_batch_size or NUM_SLOTS
        self.max_model_len = config.max_model_len or MAX_MODEL_LEN
        self._step_s = step_s
        self._load_s = load_s

    def prepare(self, files: ModelFiles, phase: Phase) -> None:
        """There are no weights."""
        del files, phase

    def load(self, files: ModelFiles, phase: Phase) -> None:
        """Sleep for ``load_s``."""
        del files
        with phase("weights"):
            time.sleep(self._load_s)

    def reseed(self) -> None:
        """Nothing here is random."""

    def settle(self) -> None:
        """Nothing here can be quicker."""

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        """The whole step at once."""
        output = self.step(batch)
        return lambda: output

    def step(self, batch: Batch) -> StepOutput:
        """Sleep for ``step_s``, then give each sequence its next token; of its parameters only the grammar counts."""
        time.sleep(self._step_s)
        sampled = batch.sampled
        token_ids = [self._next(sequence) for sequence in sampled]
        logprobs = {
            row: _certain(token_ids[row], sequence.params.logprobs)
            for row, sequence in enumerate(sampled)
            if sequence.params.logprobs is not None
        }
        prompt_logprobs = {
            index: [_certain(token_id, num_top) for token_id in chunk.predicted]
            for index, chunk in enumerate(batch.chunks)
            if (num_top := chunk.sequence.params.prompt_logprobs) is not None
        }
        return StepOutput([*token_ids], logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _next(self, sequence: Sequence) -> int:
        prompt, place = sequence.prompt_token_ids, len(sequence.output_token_ids)
        wanted = prompt[place] if place < len(prompt) else EOS_TOKEN_ID
        if sequence.grammar is None or sequence.grammar.is_finished:
            return wanted
        allowed = int.from_bytes(sequence.grammar.allowed(), "little")
        first = (wanted, *b'"') if _is_inside_string(sequence.output_token_ids) else (wanted,)
        return next(token_id for token_id in (*first, *_BY_URGE_TO_END) if allowed >> token_id & 1)


def _is_inside_string(token_ids: Seq[int]) -> bool:
    """Whether JSON so far has an open string, which any other byte but its quote would go on with for ever."""
    is_inside = is_escaped = False
    for token_id in token_ids:
        if is_escaped:
            is_escaped = False
        elif token_id == ord("\\"):
            is_escaped = is_inside
        elif token_id == ord('"'):
            is_inside = not is_inside
    return is_inside


def _certain(token_id: int, num_top: int) -> TokenLogprob:
    """One token has all the probability; the lowest other ids fill up the list."""
    others = [(other, MIN_LOGPROB) for other in range(num_top + 1) if other != token_id]
    return TokenLogprob(token_id, 0.0, ((token_id, 0.0), *others)[:num_top])


class EchoEngine(StepEngine):
    """The echo runner behind the real step loop.

    Args:
        config: Slots, context and queue.
        step_s: Seconds that each step takes.
        load_s: Seconds that loading takes.
    """

    def __init__(self, config: EngineConfig | None = None, *, step_s: float = 0.0, load_s: float = 0.0) -> None:
        config = config or EngineConfig()
        super().__init__(config, EchoRunner(config, step_s=step_s, load_s=load_s))
