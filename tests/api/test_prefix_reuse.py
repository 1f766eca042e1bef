"""Tokens that were not computed again are in the usage, and each key has its own."""

from __future__ import annotations

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
