"""Tokens that were not computed again are in the usage, and each key has its own."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
from support import chat, serving

from serve.engine.base import EngineConfig
from serve.engine.echo import EchoRunner
from serve.engine.worker import StepEngine


class KeepingRunner(EchoRunner):
    """An echo whose slots keep what was computed."""

    keeps_prefixes = True


def test_cached_tokens_are_in_the_usage_and_no_key_sees_anothers():
    config = EngineConfig()
    text = "The same words again and again, more than sixteen of them."
    with serving(StepEngine(config, KeepingRunner(config)), api_keys="one,two") as served, httpx.Client() as client:

        def cached(key: str, words: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            answer = client.post(f"{served.url}/v1/chat/completions", json=chat(words), headers=headers).json()
            usage = answer["usage"]
            assert usage["prompt_tokens"] == len(words.encode())
            return usage["prompt_tokens_details"]["cached_tokens"]

        whole = len(text.encode()) - 1
        assert cached("one", text) == 0
        assert cached("one", text) == whole
        assert cached("two", text) == 0
        assert cached("two", text + " And more.") == whole + 1
        assert cached("two", "Something else, which begins in another way.") == 0


def test_every_wire_reports_what_another_wire_had_computed():
    """The prompt is the same text on all of them, so that each goes on from the one before."""
    config = EngineConfig()
    text = "The same words again and again, more than sixteen of them."
    size = len(text.encode())
    message = {"role": "user", "content": text}
    with serving(StepEngine(config, KeepingRunner(config))) as served, httpx.Client(base_url=served.url) as client:

        def usage(path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["usage"]

        cold = usage("/v1/messages", {"model": "echo", "max_tokens": 3, "messages": [message]})
        assert (cold["input_tokens"], cold["cache_read_input_tokens"]) == (size, 0)
        warm = usage("/v1/messages", {"model": "echo", "max_tokens": 3, "messages": [message]})
        assert (warm["input_tokens"], warm["cache_read_input_tokens"]) == (1, size - 1)
        response = usage("/v1/responses", {"model": "echo", "input": text})
        assert (response["input_tokens"], response["input_tokens_details"]["cached_tokens"]) == (size, size - 1)
        completion = usage("/v1/completions", {"model": "echo", "prompt": text, "n": 2})
        assert completion["prompt_tokens_details"]["cached_tokens"] == size - 1
        chosen = usage("/v1/chat/completions", chat(text, n=3))
        assert (chosen["prompt_tokens"], chosen["prompt_tokens_details"]["cached_tokens"]) == (size, size - 1)
        echoed = usage("/v1/completions", {"model": "echo", "prompt": text, "echo": True, "logprobs": 0})
        assert echoed["prompt_tokens_details"]["cached_tokens"] == 0, "its prompt's logits need the whole prompt"
