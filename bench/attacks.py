"""Requests that a server must refuse, and bytes that are no requests at all."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

BAD_BODIES: dict[str, dict[str, Any]] = {
    "n": {"n": 10**8},
    "max_tokens": {"max_tokens": 10**12},
    "no messages": {"messages": []},
    "role": {"messages": [{"role": "root", "content": "a"}]},
    "top_p": {"top_p": -1},
    "template": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
    "image": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://[::1]/"}}]}]
    },
    "too long": {"messages": [{"role": "user", "content": "word " * 50_000}]},
    "model": {"model": "another"},
}
"""Fields that make a good request a bad one."""

_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
_RAW = {
    "garbage": bytes(range(256)) * 40,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
    "half a head": b"POST /v1/chat/completions HTTP/1.1\r\nHost:",
    "head without end": b"GET /health HTTP/1.1\r\nX: " + b"a" * 300_000,
    "no key": _HEAD + b"Content-Length: 2\r\n\r\n{}",
    "half a body": _HEAD + b"KEY\r\nContent-Length: 5000\r\n\r\n" + b'{"model":',
    "deep": _HEAD + b"KEY\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
    "endless chunk": _HEAD + b"KEY\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\nabc",
    "endless trailer": _HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 300_000,
    "upgrade": _HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
    "enormous": _HEAD + b"KEY\r\nContent-Length: 99999999999\r\n\r\n" + b"a" * 100_000,
    "pickle": b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nKEY\r\nContent-Type: application/x-pickle\r\n"
    b"Content-Length: 4\r\n\r\n\x80\x04N.",
}


async def attack(url: str, headers: dict[str, str], draw: random.Random) -> None:
    """Send something that is no good request, read a little of what comes, and leave."""
    parts = urlsplit(url)
    raw = _RAW[draw.choice(sorted(_RAW))].replace(b"KEY", f"Authorization: {headers['authorization']}".encode())
    with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(raw)
                await writer.drain()
                with suppress(TimeoutError):
                    async with asyncio.timeout(draw.uniform(0.01, 0.5)):
                        await reader.read(2000)
            finally:
                writer.transport.abort()
