"""A local RunPod with one quick worker and one slow one, which most tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runpod_local import SLOW, LocalRunpod, WorkerProcess, local_runpod

ECHOED_TOOLS: Any = {"SERVE_TOOL_PROMPT": "generic", "SERVE_TOOL_PARSER": "hermes"}
"""The echo engine repeats a tool call, and the parser reads it."""


@pytest.fixture(scope="session", autouse=True)
def _session_environment() -> Iterator[None]:
    """Workers that outlive a test must not see the developer's settings either."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name == "PORT" or name.startswith(("SERVE_", "RUNPOD_")):
                patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def _own_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deploys of a test are not deploys of this project."""
    monkeypatch.setenv("TRIMARAN_LEDGER", str(tmp_path / "ledger.jsonl"))


@pytest.fixture(scope="session")
def runpod() -> Iterator[LocalRunpod]:
    """A queue with a worker whose server would want a key on a public address."""
    with (
        local_runpod() as local,
        local.worker("quick", SERVE_API_KEYS="secret", SERVE_HOST="::", SERVE_MAX_BATCH_SIZE="4", **ECHOED_TOOLS),
    ):
        yield local


@pytest.fixture(scope="module")
def slow() -> Iterator[tuple[LocalRunpod, WorkerProcess]]:
    """A queue with a worker of two slots and 20 ms a token."""
    with local_runpod() as local, local.worker("slow", SLOW.format(step_s=0.02), SERVE_MAX_BATCH_SIZE="2") as worker:
        yield local, worker
