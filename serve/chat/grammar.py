"""What an answer may look like: JSON schemas, regular expressions, choices and Lark, as one kind of grammar.

Nothing is compiled here: :mod:`serve.chat.constraint` does that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from serve.errors import InvalidRequest

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_CHOICES = 1000

_JSON_OPTIONS = {
    # At most one space where JSON allows any: a weak model would fill the rest of its tokens with blanks.
    "whitespace_flexible": True,
    "whitespace_pattern": r"\x20",
}


def json_schema_grammar(schema: Any, param: str, *, is_lenient: bool = False) -> str:
    """The grammar of all JSON texts that a schema allows.

    Args:
        schema: An object or a boolean.
        param: The field that holds it.
        is_lenient: Leave keywords that cannot be enforced out of account instead of refusing them.

    Raises:
        InvalidRequest: it is no schema, or too large or deep.
    """
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"{param} is no JSON schema; send an object", param=param)
    if _depth(cast("Any", schema)) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"{param} is nested more than {MAX_SCHEMA_DEPTH} levels deep; flatten it", param=param)
    if schema is False:
        raise InvalidRequest(f"{param} is false, which no text matches; send an object", param=param)
    matcher, text = llguidance().LLMatcher, _checked(json.dumps({} if schema is True else schema), param)
    try:
        options = {**_JSON_OPTIONS, "lenient": is_lenient, "coerce_one_of": is_lenient}
        return matcher.grammar_from_json_schema(text, overrides=options)
    except ValueError as error:
        raise InvalidRequest(f"{param} cannot be read: {error}", param=param) from None


def regex_grammar(pattern: str, param: str) -> str:
    """The grammar of all texts that a regular expression (without look-around or back-references) matches whole."""
    return llguidance().LLMatcher.grammar_from_regex(_checked(pattern, param))


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
            raise InvalidRequest(f"{param} is no GBNF grammar: {first_line(error)}", param=param) from None
    return llguidance().LLMatcher.grammar_from_lark(text)


def named(lark: str, parts: Mapping[str, str]) -> str:
    """A grammar in Lark that names others as ``@name``."""
    grammars: list[Any] = [{"name": "start", "lark_grammar": lark}]
    for name, text in parts.items():
        # Of a grammar that is made of several, the first is the whole.
        first, *others = json.loads(text)["grammars"]
        prefix = f"{name}_"
        renamed = {other["name"]: prefix + other["name"] for other in others}
        grammars += [_renamed({**first, "name": name}, renamed)]
        grammars += [_renamed({**other, "name": renamed[other["name"]]}, renamed) for other in others]
    return json.dumps({"grammars": grammars})


def _renamed(grammar: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    lark = grammar.get("lark_grammar")
    if not lark or not names:
        return grammar
    return {**grammar, "lark_grammar": re.sub(r"@(\w+)", lambda found: "@" + names.get(found[1], found[1]), lark)}


def any_of(first: str, second: str) -> str:
    """What either of two grammars allows."""
    return named("start: @first | @second\n", {"first": first, "second": second})


def after_reasoning(grammar: str, opener: str, closer: str, *, is_open: bool) -> str:
    """A grammar for what follows the model's reasoning, which may be anything.

    Args:
        grammar: Of the rest.
        opener: Begins the reasoning; the model may also leave it out.
        closer: Ends it.
        is_open: The prompt has begun it already.
    """
    think = "rest" if is_open else f"({json.dumps(opener)} rest)?"
    lark = f"start: {think} @text\nrest: thought /\\n{{0,2}}/\nthought[suffix={json.dumps(closer)}]: /(?s:.*)/\n"
    return named(lark, {"text": grammar})


def llguidance() -> Any:
    """The library, imported when it is first needed."""
    import llguidance as library  # noqa: PLC0415

    return library


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


def first_line(message: object) -> str:
    """A message's first line, not too long, and what it announces: a wrong pattern is drawn before it is explained."""
    text = str(message).strip()
    first, why = text.partition("\n")[0], re.search(r"^error: (.*)$", text, re.MULTILINE)
    return (f"{first} {why[1]}" if why and first.endswith(":") else first)[:200]
