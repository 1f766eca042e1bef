"""The server under attack, which all of these tests share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import httpx2 as httpx
import pytest
from attack import COMPLETIONS, HEALTHY_S, KEY, OWN, Target
from support import eventually, running


@pytest.fixture(scope="session")
def target() -> Iterator[Target]:
    """The server, and a client with its key."""
    headers = {"authorization": f"Bearer {KEY}"}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name == "PORT" or name.startswith("SERVE_")]:
            patch.delenv(name)
        if not OWN:
            url = os.environ["TRIMARAN_TARGET"].rstrip("/")
            with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
                yield Target(url, client, client.get("/v1/models").json()["data"][0]["id"], None)
            return
        tools = {"SERVE_TOOL_PROMPT": "generic", "SERVE_TOOL_PARSER": "hermes"}
        with (
            running(SERVE_API_KEYS=KEY, SERVE_MAX_BODY_BYTES=str(2**20), SERVE_LOG_FORMAT="text", **tools) as server,
            httpx.Client(base_url=server.url, headers=headers, timeout=30) as client,
        ):
            eventually(lambda: client.get("/ready").status_code == 200)
            yield Target(server.url, client, "echo", server)


@pytest.fixture(autouse=True)
def _still_serves(target: Target) -> Iterator[None]:
    """After each attack the server is alive, answers a chat at once, and has told nobody its key."""
    yield
    began = time.monotonic()
    assert target.client.get("/health").status_code == 200
    answer = target.client.post(COMPLETIONS, json=target.chat())
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - began < HEALTHY_S
    if target.server is not None:
        assert target.server.process.poll() is None
        assert KEY not in target.server.log
        assert "Traceback" not in target.server.log
