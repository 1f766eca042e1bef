"""What a template may cost, what it wants messages to look like, and who may command the model."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.chat import sandbox
from serve.chat.control import ControlTokens
from serve.chat.prompt import ChatFormat
from serve.chat.template import ChatTemplate, fold
from serve.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "id": "call_1", "function": {"name": "f", "arguments": '{"x": "é"}'}}
WITH_CALL = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "7"}]

CALLS = "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}%s{% endif %}{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def render(source: str, messages=(USER,), **more) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **more)


# Templates only learn at load what they see there; a template that loops for ever at load would never be served.
LOOPS = {
    "nested loops": "{% if messages|length > 5 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}",
    "loops of the caller's length": "{% for a in messages %}{% for b in messages %}{% for c in messages %}"
    "{% for d in messages %}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
    "macros that call each other": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{% if messages|length > 5 %}{{ f(40) }}{% endif %}",
}


@pytest.mark.parametrize("name", LOOPS)
def test_template_that_would_run_for_ever_is_stopped(name, monkeypatch):
    template = ChatTemplate(LOOPS[name], {})
    monkeypatch.setattr(sandbox, "RENDER_LIMIT_S", 0.1)
    began = time.thread_time()
    with pytest.raises(InvalidRequest, match=r"more than 0\.1 s") as caught:
        template.render([USER] * 2000)
    assert caught.value.param == "messages"
    assert time.thread_time() - began < 5  # the limit with room for a slow machine; without it: hours


def test_template_that_is_stopped_does_not_stop_others(monkeypatch):
    """Two threads render with one template: each has its own clock."""
    template = ChatTemplate(LOOPS["nested loops"] + "{{ messages[0].content }}", {})
    monkeypatch.setattr(sandbox, "RENDER_LIMIT_S", 0.3)
    errors: list[Exception] = []

    def hostile() -> None:
        with pytest.raises(InvalidRequest) as caught:
            template.render([USER] * 10)
        errors.append(caught.value)

    thread = threading.Thread(target=hostile)
    thread.start()
    answers = [template.render([USER]) for _ in range(20)]
    thread.join()
    assert answers == ["hi"] * 20
    assert len(errors) == 1


def test_template_output_is_bounded(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(InvalidRequest, match="1000 characters"):
        render("{% for i in range(99) %}{{ messages[0].content }}{% endfor %}", [{**USER, "content": "x" * 50}])


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ("{{ m.tool_calls[0].function.arguments | tojson }}", '{"x": "é"}'),  # hermes, qwen, llama
        ("{{ 'args: ' + m.tool_calls[0].function.arguments }}", 'args: {"x": "é"}'),  # deepseek
    ],
)
def test_template_gets_arguments_as_it_wants_them(how, shown):
    source = CALLS.replace("%s", "{{ m.tool_calls[0].function.name }}" + how)
    assert render(source, WITH_CALL) == f"[user][assistant]f{shown}[tool]"


def test_template_gets_arguments_that_are_no_object_as_they_are():
    call = {**CALL, "function": {"name": "f", "arguments": "{broken"}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    source = CALLS.replace("%s", "{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}")
    assert render(source, messages) == '[user][assistant]f"{broken"'


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (
            "{% for m in messages %}[{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"
            "]{% endfor %}",
            "[hi][f][7]",
        ),
        (  # this one takes a message without None for a plain one
            "{% for m in messages %}{% if m.content is none %}[{{ m.tool_calls[0].function.name }}]"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "hi[f]7",
        ),
        ("{% for m in messages %}{{ m.content | trim }}{{ (m.tool_calls or [{}])[0].id }}{% endfor %}", "hicall_17"),
    ],
)
def test_template_gets_null_content_as_it_wants_it(source, shown):
    """Case 18."""
    assert render(source, WITH_CALL) == shown


@pytest.mark.parametrize(("words", "role"), [("", "system"), ("{# developer #}", "developer")])
def test_template_gets_developers_as_system_unless_it_knows_them(words, role):
    assert render("{{ messages[0].role }}" + words, [{"role": "developer", "content": "x"}]) == role


def test_template_gets_tools_and_switches():
    source = "{{ tools | map(attribute='function') | map(attribute='name') | join }}{{ enable_thinking }}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert render(source, tools=tools, variables={"enable_thinking": False}) == "fFalse"
    assert ChatTemplate(source, {}).reads_tools
    assert not ChatTemplate("{{ messages[0].content }}", {}).reads_tools


def test_template_variables_cannot_replace_messages_or_tokens():
    variables = {"messages": [{"role": "user", "content": "evil"}], "bos_token": "evil"}
    assert render("{{ bos_token }}{{ messages[0].content }}", variables=variables) == "<s>hi"


def test_template_for_tools_is_used_with_tools_only():
    template = ChatTemplate("plain", {}, "{{ tools[0].function.name }}")
    assert template.render([USER]) == "plain"
    assert template.render([USER], [{"type": "function", "function": {"name": "f"}}]) == "f"


# Folding.


class Bytes:
    """A tokenizer whose tokens are bytes, so that a prompt's text can be read."""

    special_tokens = {}  # noqa: RUF012
    tool_chat_template = control = max_chars_per_token = None

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template

    def encode(self, text, *, adds_special=False):
        return list(text.encode())

    def decode(self, token_ids, *, skips_special=True):
        return bytes(token_ids).decode()

    def token_id(self, token):
        return None

    def vocabulary(self):
        raise NotImplementedError

    def decoder(self, kept):
        return self.decode

    def token_bytes(self, token_id):
        return bytes((token_id,))


MIXED = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}]


def test_refusal_keeps_the_templates_words_unless_folding_is_on():
    """Case 22."""
    tokenizer = Bytes(ALTERNATING)
    with pytest.raises(InvalidRequest, match="must alternate user/assistant"):
        ChatFormat(tokenizer).prompt(MIXED)
    folding = ChatFormat(tokenizer, folds_messages=True)
    assert bytes(folding.prompt(MIXED)).decode() == "[user]S\n\na\n\nb"
    with pytest.raises(InvalidRequest, match="must alternate"):
        folding.prompt([{"role": "assistant", "content": "first"}])


def test_folding_leaves_messages_alone_that_the_template_takes():
    tokenizer = Bytes("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    assert bytes(ChatFormat(tokenizer, folds_messages=True).prompt(MIXED)).decode() == "[system]S[user]a[user]b"


ROLES = st.sampled_from(["system", "developer", "user", "assistant"])
MESSAGES = st.lists(st.builds(lambda role, text: {"role": role, "content": text}, ROLES, st.text("abc")), max_size=8)


@given(MESSAGES)
def test_folding_keeps_every_word_and_alternates(messages):
    folded = fold(messages)
    roles = [message["role"] for message in folded]
    assert set(roles) <= {"user", "assistant"}
    assert all(first != second for first, second in itertools.pairwise(roles))
    assert sorted("".join(m["content"] for m in folded).replace("\n", "")) == sorted(
        "".join(m["content"] for m in messages)
    )


def test_folding_keeps_calls_apart():
    assert fold([*WITH_CALL, {"role": "tool", "content": "8"}]) == [*WITH_CALL, {"role": "tool", "content": "8"}]


# Control tokens.

TOKENS = ["<a>", "<ab>", "ab", "ba", "<|x|>"]


@given(st.text("<ab>|x", max_size=40))
@settings(max_examples=300)
def test_control_tokens_are_broken_wherever_they_begin(text):
    control = ControlTokens(TOKENS)
    separated = control.in_value(text)
    assert not any(token in separated.replace(control.separator, "\0") for token in TOKENS)
    assert separated.replace(control.separator, "") == text
    if not any(token in text for token in TOKENS):
        assert separated == text


def test_control_tokens_are_found_across_the_windows_of_a_long_text():
    control = ControlTokens(["<|end|>"])
    for at in range(2**16 - 8, 2**16 + 2):
        assert control.separator in control.in_value("x" * at + "<|end|>" + "y" * 100)


def test_control_tokens_of_reasoning_stay_in_assistant_messages():
    control = ControlTokens(["<|end|>"], ["<think>"])
    message = {"role": "assistant", "content": "<think><|end|>"}
    assert control.in_message(message)["content"].startswith("<think>")
    assert "<|end|>" not in control.in_message(message)["content"]
    assert "<think>" not in control.in_message({**message, "role": "user"})["content"]
