"""What may be sent to a queue, and what comes back: the same answers as over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest
from runpod_local import LocalRunpod, openai_input
from support import chat, joined, openai_error, sse_chunks

TEXT = "héllo 🎉🏽 \u2028 wörld"


def failed(job: Any) -> tuple[int, dict[str, Any]]:
    """The status and the OpenAI error of a failed job."""
    assert job["status"] == "FAILED", job
    error = json.loads(job["error"])
    return error.pop("status"), openai_error(error)


def test_openai_input_gives_the_whole_answer(runpod: LocalRunpod):
    job = runpod.runsync(openai_input(TEXT))
    assert job["status"] == "COMPLETED", job
    [answer] = job["output"]
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == TEXT


def test_openai_stream_is_bare_event_text_and_folds_to_the_same_answer(runpod: LocalRunpod):
    pieces, last = runpod.stream(runpod.run(openai_input(TEXT, stream=True)))
    assert last["status"] == "COMPLETED"
    assert all(isinstance(piece, str) for piece in pieces)
    assert joined(sse_chunks("".join(pieces))) == TEXT


@pytest.mark.parametrize(
    "job_input",
    [
        {"route": "/v1/chat/completions", "method": "POST", "body": chat(TEXT)},
        {"route": "v1/chat/completions", "body": chat(TEXT)},
        {"openai_input": chat(TEXT)},
        chat(TEXT),
        {"messages": chat(TEXT)["messages"], "max_tokens": 500},
    ],
)
def test_every_openai_shape_gives_a_chat_completion(runpod: LocalRunpod, job_input):
    job = runpod.runsync(job_input)
    assert job["status"] == "COMPLETED", job
    assert job["output"][0]["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize("extra", [{}, {"sampling_params": {"max_tokens": 500, "temperature": 0.5}, "batch_size": 10}])
def test_native_messages_give_text_and_usage(runpod: LocalRunpod, extra):
    job = runpod.runsync({"messages": chat(TEXT)["messages"], **extra})
    [answer] = job["output"]
    num_tokens = len(TEXT.encode())
    assert answer == {
        "seq": 0,
        "text": TEXT,
        "choices": [{"tokens": [TEXT]}],
        "finish_reason": "stop",
        "usage": {"input": num_tokens, "output": answer["usage"]["output"]},
    }


def test_native_prompt_with_a_chat_template_is_a_message(runpod: LocalRunpod):
    job = runpod.runsync({"prompt": TEXT, "apply_chat_template": True, "sampling_params": {"max_tokens": 500}})
    assert job["output"][0]["text"] == TEXT


def test_native_prompt_is_completed_as_it_is(runpod: LocalRunpod):
    job = runpod.runsync({"prompt": TEXT, "sampling_params": {"max_tokens": 500}})
    assert job["output"][0]["text"] == TEXT
    pieces, _ = runpod.stream(runpod.run({"prompt": TEXT, "stream": True, "sampling_params": {"max_tokens": 500}}))
    assert "".join(piece["text"] for piece in pieces) == TEXT
    plain = runpod.runsync({"model": "echo", "prompt": TEXT, "max_tokens": 500})
    assert plain["output"][0]["object"] == "text_completion"


def test_native_stream_has_numbered_chunks(runpod: LocalRunpod):
    pieces, _ = runpod.stream(runpod.run({"messages": chat(TEXT * 20)["messages"], "stream": True}))
    assert [piece["seq"] for piece in pieces] == list(range(len(pieces)))
    assert "".join(piece["text"] for piece in pieces) == TEXT * 20
    assert pieces[-1]["finish_reason"] == "stop"
    assert pieces[-1]["usage"]["input"] == len((TEXT * 20).encode())


@pytest.mark.parametrize(
    ("job_input", "param"),
    [
        ({}, "input"),
        ({"text": "hi"}, "input"),
        ("hi", "input"),
        (None, "input"),
        ([1], "input"),
        ({"route": "https://example.org/"}, "input.route"),
        ({"route": "/v1/models", "method": "BREW"}, "input.method"),
        ({"openai_route": 5}, "input.openai_route"),
        ({"messages": [], "sampling_params": 5}, "input.sampling_params"),
    ],
)
def test_another_input_is_refused_with_what_is_accepted(runpod: LocalRunpod, job_input, param):
    status, error = failed(runpod.runsync(job_input))
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert "send" in error["message"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_errors_keep_status_and_body(runpod: LocalRunpod, is_stream):
    job_id = runpod.run(openai_input("hi", temperature=9, stream=is_stream))
    pieces, _ = runpod.stream(job_id)
    status, error = failed(runpod.status(job_id))
    assert (status, error["param"]) == (400, "temperature")
    assert "temperature" in error["message"]
    if is_stream:  # also the last thing on the stream, for those who read only that
        first, last = pieces[-1].split("\n\n")[:2]
        assert openai_error(json.loads(first.removeprefix("data: "))) == error
        assert last == "data: [DONE]"
    assert "Traceback" not in json.dumps(runpod.status(job_id))


def test_pages_and_empty_answers_travel_too(runpod: LocalRunpod):
    assert "<html" in runpod.runsync({"route": "/"})["output"][0].lower()
    assert runpod.runsync({"route": "/ping"})["output"] == [{"status": 200}]
