"""What an answer may look like: JSON schemas, regular expressions, choices and Lark grammars to token masks.

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
from typing import Any, cast

from serve.errors import InvalidRequest, UnsupportedParameter
from serve.types import Grammar

logger = logging.getLogger(__name__)

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_CHOICES = 1000
COMPILE_LIMIT_S = 5.0

_JSON_OPTIONS = {
    # At most one space where JSON allows any: a weak model would fill the rest of its tokens with blanks.
    "whitespace_flexible": True,
    "whitespace_pattern": r"\x20",
    # What a schema asks for under x-guidance must not weaken it.
    "lenient": False,
    "coerce_one_of": False,
}
_LIMITS = {"max_grammar_size": 100_000, "max_lexer_states": 20_000, "step_lexer_fuel": 100_000, "verbose_errors": False}
_KEPT = 8
"""Compiled grammars kept: agents send the same one again and again, and each may hold tens of MB."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens by id, which ids are special (those never stand for text), and how it splits a text."""

    tokens: Sequence[bytes]
    special_token_ids: frozenset[int]
    encode: Callable[[str], list[int]]


def json_schema_grammar(schema: Any, param: str) -> str:
    """The grammar of all JSON texts that a schema allows.

    Args:
        schema: An object or a boolean.
        param: The field that holds it.

    Raises:
        InvalidRequest: it is no schema, or too large or deep.
    """
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"{param} is no JSON schema; send an object", param=param)
    if _depth(cast("Any", schema)) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"{param} is nested more than {MAX_SCHEMA_DEPTH} levels deep; flatten it", param=param)
    if schema is False:
        raise InvalidRequest(f"{param} is false, which no text matches; send an object", param=param)
    matcher, text = _llguidance().LLMatcher, _checked(json.dumps({} if schema is True else schema), param)
    try:
        return matcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise InvalidRequest(f"{param} cannot be read: {error}", param=param) from None


def regex_grammar(pattern: str, param: str) -> str:
    """The grammar of all texts that a regular expression (without look-around or back-references) matches whole."""
    return _llguidance().LLMatcher.grammar_from_regex(_checked(pattern, param))


def choice_grammar(choices: Sequence[str], param: str) -> str:
    """The grammar of some texts.

    Raises:
        InvalidRequest: there is none, too many, or an empty one.
    """
    if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
        raise InvalidRequest(f"{param} needs 1 to {MAX_CHOICES} strings, none of them empty", param=param)
    text = "|".join(re.escape(choice) for choice in dict.fromkeys(choices))
    return regex_grammar(f"(?:{text})", param)


def lark_grammar(text: str, param: str) -> str:
    """The grammar that a text in Lark (or GBNF) describes."""
    _checked(text, param)
    if "::=" in text:
        from llguidance.gbnf_to_lark import any_to_lark  # noqa: PLC0415

        try:
            text = any_to_lark(text)
        except Exception as error:
            raise InvalidRequest(f"{param} is no GBNF grammar: {_first_line(error)}", param=param) from None
    return _llguidance().LLMatcher.grammar_from_lark(text)


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
        return lambda: TokenGrammar(matcher.deep_copy())

    def _matcher(self, grammar: str, param: str) -> Any:
        llguidance = _llguidance()
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
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
        tokenizer = _llguidance().LLTokenizer(tokens, n_vocab=len(vocabulary.tokens), eos_token=eos_token_ids)
        seconds = time.perf_counter() - began
        logger.info("Grammars: %d tokens indexed in %.2f s", len(vocabulary.tokens), seconds)
        return tokenizer


class TokenGrammar:
    """The constraint of one sequence: a :class:`~serve.types.Grammar`."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> bytes:
        """The next token's bit mask.

        Raises:
            ValueError: the grammar has become too complex to go on.
        """
        mask: bytes = self._matcher.compute_bitmask()
        self._check()
        return mask

    def accept(self, token_id: int) -> None:
        """Go on with the token that was taken.

        Raises:
            ValueError: :meth:`allowed` did not allow it.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())


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


def _llguidance() -> Any:
    import llguidance  # noqa: PLC0415

    return llguidance


def _checked(text: str, param: str) -> str:
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{param} is larger than {MAX_GRAMMAR_BYTES // 1024} KiB; make it smaller", param=param)
    return text


def _depth(value: Any) -> int:
    """Levels of a JSON value; the parser that read it bounds the recursion."""
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, cast("Mapping[str, Any]", value).values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, cast("list[Any]", value)), default=0)
    return 0


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
    return InvalidRequest(f"{param} cannot be used: {_first_line(message)}", param=param)


def _first_line(message: object) -> str:
    return str(message).strip().partition("\n")[0][:200]
