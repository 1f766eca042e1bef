"""Tools and reasoning end to end: a scripted model behind the real engine, on a real port, read by real clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from support import Served, chat, joined, openai_error, scripted_engine, serving, sse_chunks

PATH = "/v1/chat/completions"

TEMPLATES = {
    "hermes": "{% if tools %}<tools>{{ tools | tojson }}</tools> Answer in <tool_call>.{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}",
    "opened": "{{ tools }}{{ messages[-1].content }}</think><tool_call><think>\n",
    "mistral": "[TOOL_CALLS]{{ tools }}{{ messages[-1].content }}",
    "harmony": "<|channel|>{{ tools }}{{ reasoning_effort }}{{ messages[-1].content }}",
    "levels": "{{ reasoning_effort }}{{ messages[-1].content }}",
    "unknown": "{{ tools }}{{ messages[-1].content }}",
    "plain": "{{ messages[-1].content }}",
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


@contextmanager
def scripted(folder: Path, text: str, template: str = "hermes", **settings: Any) -> Iterator[Served]:
    """A server whose model writes ``text``, whatever it is asked."""
    path = folder / f"{template}.jinja"
    path.write_text(TEMPLATES[template], encoding="utf-8")
    with serving(scripted_engine(list(text.encode())), chat_template=path, **settings) as served:
        yield served


def ask(served: Served, **fields: Any) -> tuple[dict[str, Any], str | None]:
    """The message and its finish reason, which must be the same plain and streamed, in the real client too."""
    fields = {"tools": [WEATHER, TIME], **fields}
    with OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "Weather?"}]
        whole = client.chat.completions.create(model="echo", messages=messages, **fields)
        final = whole
        if "max_tokens" not in fields:  # for the client's helper a cut answer is an error
            with client.chat.completions.stream(model="echo", messages=messages, **fields) as stream:
                final = stream.get_final_completion()
    body = {"model": "echo", "messages": messages, "stream": True, **fields}
    chunks = sse_chunks(httpx.post(served.url + PATH, json=body, timeout=30).text)
    message, reason = simple(whole), whole.choices[0].finish_reason
    streamed = folded(chunks)
    assert streamed == message
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == reason
    assert simple(final)["tool_calls"] == message["tool_calls"]
    assert final.choices[0].finish_reason == reason
    return message, reason


def simple(completion: ChatCompletion) -> dict[str, Any]:
    message = completion.choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]  # pyright: ignore[reportAttributeAccessIssue]
    reasoning = (message.model_extra or {}).get("reasoning_content")
    return {"content": message.content, "reasoning_content": reasoning, "tool_calls": calls}


def folded(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The chunks joined as clients do it; the shape of each is checked on the way (cases 36 and 37)."""
    content, reasoning, calls = "", "", []
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        content += delta.get("content") or ""
        reasoning += delta.get("reasoning_content") or ""
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for call in delta.get("tool_calls", ()):
            assert isinstance(call["function"]["arguments"], str)
            if call["index"] == len(calls):
                assert set(call) == {"index", "id", "type", "function"}
                calls.append((call["function"]["name"], call["function"]["arguments"]))
            else:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                name, arguments = calls[call["index"]]
                calls[call["index"]] = (name, arguments + call["function"]["arguments"])
    return {
        "content": content or (None if calls else ""),
        "reasoning_content": reasoning or None,
        "tool_calls": calls,
    }


def test_model_calls_a_tool_by_itself(tmp_path: Path) -> None:
    with scripted(tmp_path, f"Let me see.\n{CALL}") as served:
        message, reason = ask(served)
    assert message["content"] == "Let me see."
    assert message["tool_calls"] == [("get_weather", '{"city": "Zürich"}')]
    assert reason == "tool_calls"


def test_calls_have_increasing_indexes_and_one_is_enough_where_one_was_asked_for(tmp_path: Path) -> None:
    """Case 37."""
    second = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    with scripted(tmp_path, f"{CALL}\n{second}") as served:
        message, reason = ask(served)
        assert [name for name, _ in message["tool_calls"]] == ["get_weather", "get_time"]
        assert (message["content"], reason) == (None, "tool_calls")
        message, reason = ask(served, parallel_tool_calls=False)
        assert [name for name, _ in message["tool_calls"]] == ["get_weather"]


def test_other_families_are_read_too(tmp_path: Path) -> None:
    with scripted(tmp_path, '[TOOL_CALLS]get_weather[ARGS]{"city": "Rom"}', "mistral") as served:
        message, _ = ask(served)
        body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "tools": [WEATHER]}
        answer = httpx.post(served.url + PATH, json=body).json()
    assert message["tool_calls"] == [("get_weather", '{"city": "Rom"}')]
    call_id = answer["choices"][0]["message"]["tool_calls"][0]["id"]
    assert len(call_id) == 9
    assert call_id.isalnum()


def test_operator_names_the_family(tmp_path: Path) -> None:
    with scripted(tmp_path, CALL, "unknown", tool_parser="hermes") as served:
        assert ask(served)[1] == "tool_calls"
    with scripted(tmp_path, CALL, "hermes", tool_parser="none") as served:
        response = post(served, tools=[WEATHER])
        assert response.status_code == 400
        assert "SERVE_TOOL_PARSER" in openai_error(response.json())["message"]


@pytest.mark.parametrize("broken", ["<tool_call>{oops}</tool_call> sorry", "<tool_call>", '<tool_call>{"name": 5}'])
def test_malformed_calls_are_text(tmp_path: Path, broken: str) -> None:
    with scripted(tmp_path, broken) as served:
        message, reason = ask(served)
    assert message == {"content": broken, "reasoning_content": None, "tool_calls": []}
    assert reason == "stop"


def test_call_that_max_tokens_cuts_off_is_no_call(tmp_path: Path) -> None:
    with scripted(tmp_path, f"See:{CALL}") as served:
        message, reason = ask(served, max_tokens=40)
    assert message == {"content": "See:", "reasoning_content": None, "tool_calls": []}
    assert reason == "length"


def test_without_tools_marks_are_text(tmp_path: Path) -> None:
    with scripted(tmp_path, CALL) as served:
        assert ask(served, tools=[])[0]["content"] == CALL
        assert ask(served, tool_choice="none")[0]["content"] == CALL


def post(served: Served, content: str = "a", **fields: Any) -> httpx.Response:
    body = {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}
    return httpx.post(served.url + PATH, json=body, timeout=30)


def test_reasoning_is_split_off_and_counted(tmp_path: Path) -> None:
    with scripted(tmp_path, "<think>\nhmm\n</think>\n\nYes.", "opened") as served:
        assert ask(served, tools=[])[0]["reasoning_content"] == "hmm"  # a model may open it once more
    with scripted(tmp_path, "hmm\n</think>\n\nYes.", "opened") as served:
        message, reason = ask(served, tools=[])
        assert message == {"content": "Yes.", "reasoning_content": "hmm", "tool_calls": []}
        assert reason == "stop"
        usage = post(served).json()["usage"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] == len("hmm\n</think>")
        message, reason = ask(served, tools=[], max_tokens=2)
        assert message == {"content": "", "reasoning_content": "hm", "tool_calls": []}
        assert reason == "length"


def test_reasoning_then_call(tmp_path: Path) -> None:
    with scripted(tmp_path, f"I need it.\n</think>\n\n{CALL}", "opened") as served:
        message, reason = ask(served)
    assert message["reasoning_content"] == "I need it."
    assert message["content"] is None
    assert message["tool_calls"] == [("get_weather", '{"city": "Zürich"}')]
    assert reason == "tool_calls"


def test_harmony_channels(tmp_path: Path) -> None:
    text = (
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Oslo"}'
    )
    with scripted(tmp_path, text, "harmony") as served:
        message, reason = ask(served)
    assert message == {
        "content": None,
        "reasoning_content": "Think.",
        "tool_calls": [("get_weather", '{"city": "Oslo"}')],
    }
    assert reason == "tool_calls"


@pytest.mark.parametrize(
    ("template", "effort", "status"),
    [
        ("hermes", "none", 200),
        ("hermes", "high", 200),
        ("levels", "minimal", 200),
        ("levels", "none", 200),  # it does not reason, so there is nothing to turn off
        ("harmony", "none", 400),
        ("plain", "high", 400),
        ("plain", "none", 200),
        ("plain", "minimal", 200),
        ("opened", "minimal", 400),
        ("plain", "enormous", 400),
    ],
)
def test_reasoning_effort_speaks_the_templates_words_or_is_refused(
    tmp_path: Path, template: str, effort: str, status: int
) -> None:
    with scripted(tmp_path, "ok", template) as served:
        response = post(served, reasoning_effort=effort)
    assert response.status_code == status, response.text
    if status == 400:
        assert openai_error(response.json())["param"] == "reasoning_effort"


def test_reasoning_effort_reaches_the_template(tmp_path: Path) -> None:
    path = tmp_path / "echo.jinja"
    path.write_text("{{ reasoning_effort }} {{ enable_thinking }}", encoding="utf-8")
    with serving(chat_template=path) as served:
        answers = [post(served, reasoning_effort=effort).json() for effort in ("minimal", "medium", "max")]
        own = post(served, reasoning_effort="low", chat_template_kwargs={"enable_thinking": False}).json()
    said = [answer["choices"][0]["message"]["content"] for answer in [*answers, own]]
    assert said == ["low True", "medium True", "high True", "low False"]


def test_template_without_tools_refuses_them_or_explains_them(tmp_path: Path) -> None:
    with scripted(tmp_path, "x", "plain") as served:
        error = openai_error(post(served, tools=[WEATHER]).json())
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
        assert "SERVE_TOOL_PROMPT=generic" in error["message"]
    path = tmp_path / "all.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", encoding="utf-8")
    history = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {
            "name": "get_weather", "arguments": '{"city": "Rom"}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": "Sunny"},
    ]  # fmt: skip
    with serving(chat_template=path, tool_prompt="generic") as served:
        body = {"model": "echo", "messages": history, "tools": [WEATHER], "tool_choice": "none"}
        prompt = httpx.post(served.url + PATH, json=body).json()["choices"][0]["message"]["content"]
    assert "[assistant]<tool_call>" in prompt
    assert "[user]<tool_response>\nSunny\n</tool_response>" in prompt
    with scripted(tmp_path, CALL, "plain", tool_prompt="generic") as served:
        assert ask(served)[0]["tool_calls"] == [("get_weather", '{"city": "Zürich"}')]


def test_demanded_call_that_is_cut_off_leaves_no_marks(tmp_path: Path) -> None:
    path = tmp_path / "hermes.jinja"
    path.write_text(TEMPLATES["hermes"], encoding="utf-8")
    with serving(chat_template=path) as served, httpx.Client(base_url=served.url) as client:
        for max_tokens in (1, 5, 11, 12, 20):
            fields = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": max_tokens}
            [choice] = client.post(PATH, json=chat("Weather?", **fields)).json()["choices"]
            assert choice["finish_reason"] == "length"
            assert not choice["message"]["content"]
            chunks = sse_chunks(client.post(PATH, json=chat("Weather?", stream=True, **fields)).text)
            assert joined(chunks) == ""


def test_tool_arguments_are_always_an_object(tmp_path: Path) -> None:
    """Some models write them twice as JSON, or leave them out."""
    for text, expected in {
        '<tool_call>{"name": "get_time", "arguments": "{\\"a\\": 1}"}</tool_call>': {"a": 1},
        '<tool_call>{"name": "get_time"}</tool_call>': {},
    }.items():
        with scripted(tmp_path, text) as served:
            [(_, arguments)] = ask(served)[0]["tool_calls"]
            assert json.loads(arguments) == expected
