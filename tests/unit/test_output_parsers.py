# ruff: noqa: RUF001 - DeepSeek writes its marks with wide bars
"""Calls and reasoning in what models write: recorded outputs of nine families, and every way to cut them."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from canitoolcall.fixtures import Fixture, load_fixtures
from canitoolcall.pytest_plugin import assert_conforms, family_for
from canitoolcall.results import ParseResult
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.chat.calls import DemandedCallsParser
from serve.chat.output.choose import PARSERS, choose
from serve.chat.output.parser import OutputParser
from serve.chat.output.parts import Part, Tools

# Ours by theirs; two of Kimi's formats share one family there.
FAMILIES = {
    "deepseek": "deepseek",
    "gemma4": "gemma",
    "glm": "hermes",
    "gpt-oss": "harmony",
    "kimi": "kimi",
    "llama": "llama",
    "mistral": "mistral",
    "qwen3-hermes": "hermes",
    "qwen3-xml": "hermes",
}
# A ratchet: raise a number when more pass, never lower it.
PASSING = {
    "deepseek": 85,
    "gemma4": 48,
    "glm": 51,
    "gpt-oss": 50,  # of 51; one call goes to a built-in tool, which is nobody's here
    "kimi": 48,  # of 49; one prompt has opened the reasoning, but the model did not reason
    "llama": 34,
    "mistral": 47,
    "qwen3-hermes": 50,
    "qwen3-xml": 54,
}


def parser_of(fixture: Fixture) -> OutputParser:
    found = PARSERS["kimi_k3" if "K3" in fixture.models[0] else FAMILIES[fixture.family]]
    family = family_for(fixture)
    assert family is not None
    usual = {model.repo: model.default_generation_prompt for model in family.reference_models}
    prompt = fixture.generation_prompt or usual[fixture.models[0]] or ""
    return found(Tools(fixture.tools), is_reasoning=found.opens_reasoning(prompt))


def folded(parts: Sequence[Part]) -> dict[str, Any]:
    """Parts joined as a client joins a stream's deltas; a delta out of order fails."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        assert sum(map(bool, (part.content, part.reasoning, part.call))) == 1
        if part.call and part.call.name is not None:
            assert part.call.index == len(calls)
            assert part.call.id
            calls.append({"name": part.call.name, "arguments_raw": ""})
        elif part.call:
            assert part.call.index == len(calls) - 1
            assert part.call.id is None
        if part.call:
            calls[-1]["arguments_raw"] += part.call.arguments
    return {
        "content": "".join(part.content for part in parts) or None,
        "reasoning_content": "".join(part.reasoning for part in parts) or None,
        "tool_calls": calls,
    }


def parse(parser: OutputParser, pieces: Sequence[str], *, is_truncated: bool = False) -> dict[str, Any]:
    parts = [part for piece in pieces for part in parser.push(piece)]
    return folded([*parts, *parser.finish(is_truncated=is_truncated)])


def replay(fixture: Fixture, pieces: Sequence[str]) -> dict[str, Any]:
    return parse(parser_of(fixture), pieces, is_truncated="truncated" in fixture.tags)


def test_recorded_outputs_are_read_as_they_were_meant():
    passing: Counter[str] = Counter()
    for fixture in load_fixtures(None):
        try:
            assert_conforms(fixture, ParseResult.from_dict(replay(fixture, [fixture.raw_output])), soft=True)
            passing[fixture.family] += 1
        except AssertionError:
            pass
    assert dict(passing) == PASSING


@given(st.sampled_from(["", " "]), st.text(max_size=6), st.sampled_from(["", " "]), st.booleans(), st.integers(0, 200))
def test_demanded_calls_are_read_with_the_spaces_that_json_allows(before, city, inside, is_twice, cut):
    arguments = f'{{{inside}"city":{inside}{json.dumps(city)}{inside}}}'
    call = f'<tool_call>\n{{"name": "f", "arguments": {before}{arguments}}}\n</tool_call>'
    text = f"{call}\n{call}" if is_twice else call
    answer = parse(DemandedCallsParser(Tools([])), [text[:cut], text[cut:]])
    assert [made["arguments_raw"] for made in answer["tool_calls"]] == [arguments] * (1 + is_twice)
    assert json.loads(arguments) == {"city": city}


ALL = load_fixtures(None)


def test_recorded_outputs_mean_the_same_cut_into_characters():
    """Case 36."""
    for fixture in ALL:
        assert replay(fixture, list(fixture.raw_output)) == replay(fixture, [fixture.raw_output]), fixture.id


def test_recorded_outputs_mean_the_same_cut_in_two_anywhere():
    for family in FAMILIES:
        shortest = sorted((f for f in ALL if f.family == family), key=lambda f: len(f.raw_output))
        for fixture in shortest[:40:4]:
            text, whole = fixture.raw_output, replay(fixture, [fixture.raw_output])
            for at in range(len(text)):
                assert replay(fixture, [text[:at], text[at:]]) == whole, (fixture.id, at)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ALL), st.randoms(use_true_random=False))
def test_recorded_outputs_mean_the_same_however_they_are_cut(fixture: Fixture, rng: random.Random):
    text = fixture.raw_output
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(1, 20))))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert replay(fixture, pieces) == replay(fixture, [text])


MARKS = [
    "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "</parameter>", "f", "<arg_key>",
    "a", "</arg_key>", "<arg_value>", "</arg_value>", '{"name": "f", "arguments": {}}', '{"a": "', '"}', "{", "}",
    "[", "]", '"', "\\", "'", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]",
    "<|python_tag|>", "[f(a=1)]", "f(", ")", "<|tool_calls_section_begin|>", "<|tool_call_begin|>functions.f:0",
    "<|tool_call_end|>", "<|tool_call_argument_begin|>", "<|tool_calls_section_end|>", '<|open|>call tool="f"',
    "<|sep|>", "<|close|>call", '<|open|>argument key="a"', "<|close|>argument", "<|open|>think", "<|close|>think",
    "<|tool_call>", "<tool_call|>", "call:f{", '<|"|>', "<|channel>thought", "<channel|>", "<|channel|>analysis",
    "<|channel|>commentary to=functions.f", "<|message|>", "<|end|>", "<|call|>", "<|start|>assistant", "\n", " ",
    "é", ":", ",", "1e999", "<", "｜DSML｜", "<｜DSML｜function_calls>", '<｜DSML｜invoke name="f">',
    '<｜DSML｜parameter name="a" string="false">', "</｜DSML｜parameter>", "</｜DSML｜invoke>",
    "</｜DSML｜function_calls>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "```json", "```",
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "number"}}}}}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(PARSERS)), st.lists(st.sampled_from(MARKS), max_size=25), st.booleans(), st.booleans())
def test_any_text_is_read_without_an_error_and_the_same_in_pieces(family, marks, is_reasoning, is_truncated):
    def parser() -> OutputParser:
        return PARSERS[family](Tools([TOOL]), is_reasoning=is_reasoning)

    whole = parse(parser(), ["".join(marks)], is_truncated=is_truncated)
    assert parse(parser(), marks, is_truncated=is_truncated) == whole
    assert parse(parser(), list("".join(marks)), is_truncated=is_truncated) == whole
    for call in whole["tool_calls"]:
        assert isinstance(json.loads(call["arguments_raw"]), dict)


@pytest.mark.parametrize("family", sorted(PARSERS))
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab \n.é")), cut=st.integers(0, 50))
def test_plain_text_comes_back_unchanged(family, text, cut):
    parser = PARSERS[family](Tools([TOOL]), thinks=False)
    assert parse(parser, [text[:cut], text[cut:]])["content"] == (text or None)


HOSTILE = [
    "<", "{", "[", '"', "<tool_call>", "<tool_call>{", '{"a":"\\', "\n", "<|", "[TOOL_CALLS]", "<|tool_call>call:f{",
    "<tool_call>f<arg_key>a</arg_key>", "<|channel|>", "<think>", "</think>", "[f(", "<｜", "<|open|>", '<|"|>',
]  # fmt: skip


@pytest.mark.parametrize("family", sorted(PARSERS))
def test_reading_is_linear_in_hostile_text(family):
    """Four times the text may cost at most ten times as much; were it quadratic, it would be sixteen times."""

    def cost(unit: str, repeat: int) -> float:
        best = float("inf")
        for _ in range(2):
            parser = PARSERS[family](Tools([TOOL]))
            began = time.thread_time()
            for _ in range(repeat):
                parser.push(unit)
            parser.finish(is_truncated=False)
            best = min(best, time.thread_time() - began)
        return best

    for unit in HOSTILE:
        assert cost(unit, 4000) < 10 * cost(unit, 1000) + 0.1, unit


@pytest.mark.parametrize(
    ("template", "family", "thinks"),
    [
        ("{{ messages }}", None, False),
        ("<tool_call></tool_call>", "hermes", False),
        ("<think></think><tool_call>", "hermes", True),
        ("{{ '<|channel|>analysis<|message|>' }}", "harmony", True),
        ("<｜tool▁calls▁begin｜></think>", "deepseek", True),
        ("[TOOL_CALLS]", "mistral", False),
        ("<|python_tag|>", "llama", False),
        ("<|tool_calls_section_begin|>", "kimi", False),
        ("<|open|>message", "kimi_k3", True),
        ("<|tool_call><|channel>thought", "gemma", True),
        (None, None, False),
    ],
)
def test_family_is_read_off_the_template_and_the_reason_logged(template, family, thinks, caplog):
    caplog.set_level("INFO")
    found = choose(template, "auto")
    assert (found.family, found.thinks) == (family, thinks)
    assert caplog.messages
    assert choose(template, "mistral").family == "mistral"
    assert choose(template, "none").family is None


def test_answers_without_marks_are_not_read_at_all():
    tools = Tools([TOOL])
    assert choose("<tool_call>", "auto").parser("", tools, reads_calls=False) is None
    assert choose("{{ messages }}", "auto").parser("", tools, reads_calls=True) is None
    assert choose("<|channel|>", "auto").parser("", tools, reads_calls=False) is not None


@pytest.mark.parametrize("pieces", [["<thi", "nk>a</th", "ink>b"], list("<think>a</think>b"), ["<think>a</think>b"]])
def test_reasoning_is_split_wherever_the_tag_is_cut(pieces):
    """Case 7."""
    parser = choose("<think>", "auto").parser("", Tools([]), reads_calls=False)
    assert parser is not None
    assert parse(parser, pieces) == {"content": "b", "reasoning_content": "a", "tool_calls": []}


def test_reasoning_that_the_prompt_opened_needs_no_tag():
    parser = choose("<think></think>", "auto").parser("<|assistant|>\n<think>\n", Tools([]), reads_calls=False)
    assert parser is not None
    assert parser.is_reasoning
    assert parse(parser, ["a", "\n</think>", "\n\nb"]) == {
        "content": "b",
        "reasoning_content": "a",
        "tool_calls": [],
    }


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "integer"}, "5", 5),
        ({"type": "string"}, "5", "5"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": "boolean"}, "True", True),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", 5),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({}, "5", 5),
        ({}, "five", "five"),
        (True, "5", 5),
        ({"type": "number"}, "NaN", "NaN"),
    ],
)
def test_unquoted_arguments_get_the_type_of_the_schema(schema, text, value):
    tools = Tools([{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}])
    assert tools.value("f", "a", text) == value
    assert type(tools.value("f", "a", text)) is type(value)
