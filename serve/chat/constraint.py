"""Grammars to masks over the vocabulary, token by token.

llguidance does the work; its errors become the caller's, in plain words.  Compiling blocks: call it off the event
loop.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.chat.grammar import first_line, llguidance
from serve.errors import InvalidRequest, UnsupportedParameter
from serve.types import Grammar

logger = logging.getLogger(__name__)

COMPILE_LIMIT_S = 5.0
_LIMITS = {
    "max_items_in_row": 20_000,
    "max_grammar_size": 100_000,
    "max_lexer_states": 20_000,
    "step_lexer_fuel": 100_000,
    "verbose_errors": False,
}
_KEPT = 8
"""Compiled grammars kept: agents send the same one again and again, and each may hold tens of MB."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens by id, which ids are special (those never stand for text), and how it splits a text."""

    tokens: Sequence[bytes]
    special_token_ids: frozenset[int]
    encode: Callable[[str], list[int]]


class GrammarCompiler:
    """Grammars to constraints of one vocabulary.  Any thread may call it.

    Args:
        vocabulary: Lists the tokens; called once, when the first grammar comes.
        eos_token_ids: What may follow a complete text.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary], eos_token_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._eos_token_ids = eos_token_ids
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def compile(self, grammar: str, param: str) -> Callable[[], Grammar]:
        """What makes the constraint of one sequence, cheaply.

        Raises:
            UnsupportedParameter: a JSON schema has keywords that cannot be enforced; names them.
            InvalidRequest: the grammar is wrong, or too complex.
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
        if matcher is None:
            matcher = self._matcher(grammar, param)
            with self._lock:
                self._compiled[grammar] = matcher
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return lambda: TokenGrammar(matcher.deep_copy(), param)

    def check(self, grammar: str, param: str) -> None:
        """Refuse a grammar that is to become a part of another, naming its own field.

        Raises:
            InvalidRequest: as :meth:`compile`.
        """
        is_error, messages = llguidance().LLMatcher.validate_grammar_with_warnings(grammar, limits=_limits())
        if is_error:
            raise _explained(messages[0], param)

    def _matcher(self, grammar: str, param: str) -> Any:
        matcher = llguidance().LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits())
        if not matcher.is_error():
            # The first mask builds what the copies share; the engine's thread should not have to.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _explained(matcher.get_error(), param)
        return matcher

    def _load_tokenizer(self) -> Any:
        began, vocabulary = time.perf_counter(), self._vocabulary()
        eos_token_ids = sorted(self._eos_token_ids)
        tokens = _Tokens(vocabulary, eos_token_ids)
        tokenizer = llguidance().LLTokenizer(tokens, n_vocab=len(vocabulary.tokens), eos_token=eos_token_ids)
        seconds = time.perf_counter() - began
        logger.info("Grammars: %d tokens indexed in %.2f s", len(vocabulary.tokens), seconds)
        return tokenizer


class TokenGrammar:
    """The constraint of one sequence: a :class:`~serve.types.Grammar`.

    Args:
        matcher: Of its own.
        param: The field that asked for it.
    """

    def __init__(self, matcher: Any, param: str) -> None:
        self._matcher = matcher
        self._param = param

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> bytes:
        """The next token's bit mask.

        Raises:
            InvalidRequest: the grammar is too complex to go on with, which shows only here.
        """
        mask: bytes = self._matcher.compute_bitmask()
        self._check()
        return mask

    def accept(self, token_id: int) -> None:
        """Go on with the token that was taken.

        Raises:
            ValueError: :meth:`allowed` did not allow it.
            InvalidRequest: as :meth:`allowed`.
        """
        if not self._matcher.validate_tokens([token_id]):
            self._check()
            raise ValueError(f"the grammar does not allow token {token_id} here")
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            message = f"{self._param} became too complex while it was followed; make it simpler"
            raise InvalidRequest(message, param=self._param)


class _Tokens:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: Sequence[int]) -> None:
        self.tokens = vocabulary.tokens
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = sorted(vocabulary.special_token_ids | set(eos_token_ids))
        self._encode = vocabulary.encode
        self._ids: dict[bytes, int] | None = None

    def __call__(self, text: str) -> list[int]:
        """The tokens whose bytes are exactly those of ``text``, which a grammar leaves no choice about."""
        token_ids, wanted = self._encode(text), text.encode()
        if b"".join(self.tokens[token_id] for token_id in token_ids) == wanted:
            return token_ids
        # Some tokenizers put a space before every text.
        if self._ids is None:
            special = set(self.special_token_ids)
            self._ids = {token: at for at, token in enumerate(self.tokens) if token and at not in special}
        return _longest_matches(wanted, self._ids)


def _longest_matches(text: bytes, ids: Mapping[bytes, int]) -> list[int]:
    longest, at, token_ids = max(map(len, ids)), 0, list[int]()
    while at < len(text):
        length = next((n for n in range(min(longest, len(text) - at), 0, -1) if text[at : at + n] in ids), 0)
        if not length:
            break  # a byte that no token has: what follows cannot be written either
        token_ids.append(ids[text[at : at + length]])
        at += length
    return token_ids


def _limits() -> Any:
    return llguidance().LLParserLimits(**_LIMITS)


def _explained(message: str, param: str) -> InvalidRequest | UnsupportedParameter:
    found = re.match(r"Unimplemented keys: (\[.*\])", message)
    if found:
        names = ", ".join(json.loads(found[1]))
        return UnsupportedParameter(
            f"{param} uses {names}, which this server cannot enforce; leave it out", param=param
        )
    if message.startswith("oneOf constraints"):
        hint = "oneOf with alternatives that overlap, which this server cannot enforce; use anyOf"
        return UnsupportedParameter(f"{param} uses {hint}", param=param)
    # llguidance's word for a rule that only leads to itself.
    why = "it allows no text that ever ends" if "NoExtensionBias" in message else first_line(message)
    return InvalidRequest(f"{param} cannot be used: {why}", param=param)
