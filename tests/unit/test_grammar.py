"""Grammars without a model: a random walk through what they allow is the best adversary there is."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.chat import constraint
from serve.chat.constraint import GrammarCompiler, Vocabulary
from serve.chat.grammar import choice_grammar, json_schema_grammar, lark_grammar, regex_grammar
from serve.errors import InvalidRequest, UnsupportedParameter

# Bytes, some words that cross the borders of JSON's tokens, and the end.
WORDS = [
    b'{"', b'":', b'", "', b'"}', b"}]", b"true", b"null", b": ", b"  ", b"\n\n", "é".encode(), b'"a"', b"[[", b"1.5",
]  # fmt: skip
TOKENS = [bytes([byte]) for byte in range(256)] + WORDS + [b"<end>"]
END = len(TOKENS) - 1


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(lambda: Vocabulary(TOKENS, frozenset({END}), encode), frozenset({END}))


def walk(make: Any, rng: random.Random, max_tokens: int = 400, *, prefers_end: bool = True) -> tuple[bytes, bool]:
    """Text of a random walk, and whether it came to an end."""
    machine, text = make(), b""
    for _ in range(max_tokens):
        if machine.is_finished:
            return text, True
        mask = int.from_bytes(machine.allowed(), "little")
        allowed = [token_id for token_id in range(len(TOKENS)) if mask >> token_id & 1]
        closing = [token_id for token_id in allowed if token_id == END or TOKENS[token_id] in (b'"', b"}", b"]")]
        token_id = rng.choice(closing if closing and prefers_end and rng.random() < 0.5 else allowed)
        if token_id == END:
            return text, True
        machine.accept(token_id)
        text += TOKENS[token_id]
    return text, False


SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {"type": "object"},
    "closed": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["red", "gr\u00fcn", 3, None]},
    "array": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
    "ref": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["next"],
                "additionalProperties": False,
            }
        },
    },
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]+$", "maxLength": 9},
    "anyOf": {"anyOf": [{"type": "boolean"}, {"type": "integer", "multipleOf": 3}]},
    "discriminated": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "a"}, "v": {"type": "integer"}}, "required": ["k", "v"]},
            {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"]},
        ]
    },
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "date": {"type": "string", "format": "date"},
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False, "minItems": 2},
    "bounds": {"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_finished_walk_parses_and_validates(compiler, name):
    schema = SCHEMAS[name]
    make = compiler.compile(json_schema_grammar(schema, "x"), "x")
    rng, num_finished = random.Random(name), 0
    for _ in range(25):
        text, is_finished = walk(make, rng)
        if is_finished:
            num_finished += 1
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert num_finished >= 5


@pytest.mark.parametrize("name", ["object", "closed", "array", "map"])
def test_blanks_never_follow_each_other_outside_strings(compiler, name):
    """A weak model would go on with them for ever."""
    make = compiler.compile(json_schema_grammar(SCHEMAS[name], "x"), "x")
    rng = random.Random(1)
    for _ in range(30):
        text, _ = walk(make, rng, 60)
        outside = re.sub(rb'"(\\.|[^"\\])*("|$)', b"s", text)
        assert not re.search(rb"\s\s|[\n\t]", outside), text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5), st.integers())
def test_choices_are_met_exactly(compiler, choices, seed):
    make = compiler.compile(choice_grammar(choices, "x"), "x")
    text, is_finished = walk(make, random.Random(seed))
    assert is_finished
    assert text.decode() in choices


@pytest.mark.parametrize("pattern", ["[a-c]{3}-[0-9]{2}", "(yes|no)", r"\d{4}-\d{2}", "a?b?c?"])
def test_regular_expressions_match_the_whole_text(compiler, pattern):
    make = compiler.compile(regex_grammar(pattern, "x"), "x")
    for seed in range(10):
        text, is_finished = walk(make, random.Random(seed))
        assert is_finished
        assert re.fullmatch(pattern, text.decode())


@pytest.mark.parametrize("text", ['start: "a" start "b" | "c"', 'root ::= "a" root "b" | "c"'])
def test_lark_and_gbnf_grammars_are_followed(compiler, text):
    make = compiler.compile(lark_grammar(text, "x"), "x")
    for seed in range(10):
        walked, is_finished = walk(make, random.Random(seed))
        before, _, after = walked.partition(b"c")
        assert not is_finished or (before == b"a" * len(before) and after == b"b" * len(before))


@settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from('ab \u00e9<>"\\'), min_size=1, max_size=20))
def test_constants_of_any_text_are_written(compiler, value):
    """What a grammar leaves no choice about is split into tokens by the tokenizer."""
    text, is_finished = walk(compiler.compile(json_schema_grammar({"const": value}, "x"), "x"), random.Random(0))
    assert is_finished
    assert json.loads(text) == value


REFUSED: dict[str, tuple[Any, str]] = {
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "not": ({"not": {"type": "string"}}, "not"),
    "if": ({"if": {"type": "string"}, "then": {}}, "if"),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "contains": ({"type": "array", "contains": {}}, "contains"),
    "propertyNames": ({"type": "object", "propertyNames": {}}, "propertyNames"),
    "unevaluatedProperties": ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
    "oneOf": ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}, "oneOf"),
    "inside": ({"properties": {"a": {"items": {"not": {}}}}, "type": "object"}, "not"),
    "lenient": ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_keywords_that_cannot_be_enforced_are_refused_by_name(compiler, name):
    schema, keyword = REFUSED[name]
    with pytest.raises(UnsupportedParameter, match=keyword) as caught:
        compiler.compile(json_schema_grammar(schema, "the.field"), "the.field")
    assert caught.value.param == "the.field"


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


WRONG: dict[str, Any] = {
    "no type": {"type": "wat"},
    "no schema": 5,
    "false": False,
    "remote": {"$ref": "http://example.com/schema.json"},
    "unsatisfiable": {"type": "integer", "minimum": 5, "maximum": 3},
    "unknown format": {"type": "string", "format": "zzz"},
    "too deep": nested(40),
    "too large": {"enum": ["x" * 70_000]},
    "many combinations": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(6)]} for i in range(6)]},
    "pattern": {"type": "string", "pattern": "(?!a)"},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_schemas_are_the_callers_error(compiler, name):
    """Case 40."""
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(json_schema_grammar(WRONG[name], "x"), "x")
    assert caught.value.param == "x"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (regex_grammar, "("),
        (regex_grammar, "(?=a)b"),
        (regex_grammar, "a" * 70_000),
        (choice_grammar, []),
        (choice_grammar, [""]),
        (choice_grammar, ["a"] * 2000),
        (lark_grammar, "start: nope"),
        (lark_grammar, "no grammar"),
        (lark_grammar, "x ::= "),
    ],
)
def test_wrong_grammars_are_the_callers_error(compiler, make, value):
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(make(value, "x"), "x")
    assert caught.value.param == "x"


def test_wrong_pattern_is_explained_in_a_line(compiler):
    for make in (lambda: regex_grammar("(", "x"), lambda: json_schema_grammar({"type": "string", "pattern": "("}, "x")):
        with pytest.raises(InvalidRequest, match=r"regex parse error: unclosed group$"):
            compiler.compile(make(), "x")


def test_token_that_is_not_allowed_is_an_error(compiler):
    machine = compiler.compile(choice_grammar(["a"], "x"), "x")()
    with pytest.raises(ValueError, match=r"token"):
        machine.accept(TOKENS.index(b"b"))


def follow(machine: Any, text: str) -> None:
    for token_id in encode(text):
        machine.allowed()
        machine.accept(token_id)


def test_grammar_that_becomes_too_complex_is_the_callers_error(compiler, monkeypatch):
    monkeypatch.setitem(constraint._LIMITS, "max_items_in_row", 2000)
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(900)}}
    machine = compiler.compile(json_schema_grammar(schema, "x"), "x")()
    with pytest.raises(InvalidRequest, match="too complex") as caught:
        follow(machine, '{"p1": "abc"}')
    assert caught.value.param == "x"


def test_compiled_grammars_are_kept_and_shared(compiler, monkeypatch):
    made: list[str] = []
    original = GrammarCompiler._matcher

    def counting(self: GrammarCompiler, text: str, param: str) -> Any:
        made.append(text)
        return original(self, text, param)

    monkeypatch.setattr(GrammarCompiler, "_matcher", counting)
    texts = [choice_grammar([f"only{number}"], "x") for number in range(constraint._KEPT + 1)]
    for text in [*texts, texts[-1], texts[0]]:
        compiler.compile(text, "x")
    assert made == [*texts, texts[0]]


def test_constraints_of_one_grammar_run_in_several_threads(compiler):
    make = compiler.compile(json_schema_grammar(SCHEMAS["closed"], "x"), "x")
    texts: list[tuple[bytes, bool]] = []

    def run(seed: int) -> None:
        texts.extend(walk(make, random.Random(seed)) for _ in range(10))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 40
    for text, is_finished in texts:
        assert not is_finished or set(json.loads(text)) == {"name", "age"}


def test_llguidance_is_imported_with_the_first_grammar_and_without_torch():
    script = (
        "import sys; import serve.chat.grammar as g; assert 'llguidance' not in sys.modules\n"
        "g.choice_grammar(['a'], 'x'); print(*({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
