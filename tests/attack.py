"""A server to attack: one of ours in a process, or with TRIMARAN_TARGET any address.

    TRIMARAN_TARGET=https://my.server TRIMARAN_TARGET_KEY=... .venv/bin/python -m pytest tests/security

Of another server only what the wire shows is probed; its memory, files and sockets are out of reach.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from support import Running

OWN = "TRIMARAN_TARGET" not in os.environ
KEY = os.environ.get("TRIMARAN_TARGET_KEY", "sk-" + "attacker-must-not-see-me")
COMPLETIONS = "/v1/chat/completions"
HEALTHY_S = 5.0 if OWN else 30.0
"""Seconds that a short chat may take right after an attack."""

only_here = pytest.mark.skipif(not OWN, reason="looks into the server's process: only for a server of ours")


@dataclass(frozen=True, slots=True)
class Target:
    """A server under attack."""

    url: str
    client: httpx.Client
    model: str
    server: Running | None

    @property
    def process(self) -> Running:
        assert self.server is not None, "only for a server of ours"
        return self.server

    @property
    def address(self) -> tuple[str, int]:
        """For raw sockets."""
        parts = urlsplit(self.url)
        return str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)

    def chat(self, text: Any = "hi", **fields: Any) -> dict[str, Any]:
        """A body for the chat route."""
        return {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}

    def peak_kb(self) -> int:
        """The most memory that the server's process had."""
        status = Path(f"/proc/{self.process.process.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
