"""One request between its tokens and its events: text, log-probabilities, grammar.  Torch-free, thread-free."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence as Seq

from serve.engine.base import Decode
from serve.engine.detokenizer import Detokenizer
from serve.engine.scheduler import Sequence
from serve.errors import GenerationFailed, RequestError, ServeError
from serve.types import FinishReason, TokenEvent, TokenLogprob

logger = logging.getLogger(__name__)

GRAMMAR_FAILED = "the constraint on this request's output failed"


class LiveRequest:
    """A request that waits or runs, and what it has told its reader.

    Args:
        sequence: Its tokens.
        decode: Token ids to text.
        submitted_at: In seconds of :func:`time.perf_counter`.
    """

    def __init__(self, sequence: Sequence, decode: Decode, submitted_at: float) -> None:
        self.sequence = sequence
        self.request_id = sequence.request.request_id
        self._submitted_at = submitted_at
        self._detokenizer = Detokenizer(decode, sequence.params.stop)
        self._queue_s: float | None = None
        self._has_begun = False
        self._held: deque[tuple[int, TokenLogprob]] = deque()
        """Log-probabilities of tokens whose text is held back, with the number of characters before each."""
        self._of_prompt: list[TokenLogprob | None] = [None]

    def begin(self, now: float) -> None:
        """It has a slot.  Only the first call counts."""
        if self._queue_s is None:
            self._queue_s = now - self._submitted_at

    def add_prompt_logprobs(self, logprobs: Seq[TokenLogprob]) -> None:
        """Those of the prompt's next tokens."""
        self._of_prompt += logprobs

    def event(self, token_id: int, logprob: TokenLogprob | None) -> TokenEvent:
        """What the reader learns of the sequence's newest token; may end the sequence.

        Raises:
            GenerationFailed: the token cannot be decoded, or the grammar does not go on.
            RequestError: the caller's grammar is too complex.
        """
        sequence = self.sequence
        text, stop, end_logprob = "", None, None
        if sequence.finish_reason is FinishReason.STOP:  # its end token is no part of the text
            end_logprob = logprob
        else:
            self._accept(token_id)
            text, stop = self._push(token_id, logprob)
        if stop is not None:
            sequence.finish_reason = FinishReason.STOP
        elif sequence.finish_reason is not None:
            text += self._detokenizer.flush()
        is_all = sequence.finish_reason is not None and stop is None
        queue_s, prompt_logprobs = None, None
        if not self._has_begun:
            self._has_begun = True
            queue_s = self._queue_s
            if sequence.params.prompt_logprobs is not None:
                prompt_logprobs = tuple(self._of_prompt)
        return TokenEvent(
            text=text,
            token_id=token_id,
            finish_reason=sequence.finish_reason,
            stop=stop,
            usage=sequence.usage if sequence.finish_reason else None,
            queue_s=queue_s,
            logprobs=self._released(is_all) if self._held else (),
            prompt_logprobs=prompt_logprobs,
            end_logprob=end_logprob,
        )

    def _push(self, token_id: int, logprob: TokenLogprob | None) -> tuple[str, str | None]:
        if logprob is not None:
            self._held.append((self._detokenizer.num_decoded, logprob))
        try:
            return self._detokenizer.push(token_id)
        except Exception as error:
            # Its words may hold the text.
            logger.error("Decoding the tokens of request %s failed: %s", self.request_id, type(error).__name__)
            raise GenerationFailed("the model's tokens cannot be decoded") from error

    def _accept(self, token_id: int) -> None:
        grammar = self.sequence.grammar
        if grammar is None:
            return
        try:
            grammar.accept(token_id)
            if grammar.is_finished:
                self.sequence.finish_reason = FinishReason.STOP
        except RequestError:  # the caller asked for what cannot be done
            raise
        except Exception as error:
            logger.error("The grammar of request %s failed: %s", self.request_id, type(error).__name__)
            raise GenerationFailed(GRAMMAR_FAILED) from error

    def _released(self, is_all: bool) -> tuple[TokenLogprob, ...]:
        """Those of the tokens whose text began to leave."""
        count = 0
        is_all = is_all or self._detokenizer.holds_nothing
        while count < len(self._held) and (is_all or self._held[count][0] < self._detokenizer.num_released):
            count += 1
        return tuple(self._held.popleft()[1] for _ in range(count))

    def failure(self, error: ServeError) -> TokenEvent:
        """The event that ends it with ``error``."""
        self.sequence.finish_reason = FinishReason.ERROR
        return TokenEvent(finish_reason=FinishReason.ERROR, error=error, usage=self.sequence.usage)
