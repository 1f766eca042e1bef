"""What stands between a client and a server in tests: a proxy with a fault, or a platform's address."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from support import Served, eventually

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@contextmanager
def in_front(served: Served, fault: Callable[[App], App]) -> Iterator[str]:
    """A port of its own with ``fault`` between it and the server's app, on the server's own event loop."""
    config = uvicorn.Config(fault(served.app), host="127.0.0.1", port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.run_coroutine_threadsafe(server.serve(), served.app.state.loop)
    eventually(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    serving.result(10)


async def answer(send: Send, status: int, body: Any) -> None:
    """JSON, and nothing else."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


class Stage:
    """A deployed service's address: the server as long as it runs a good deploy, born with that deploy.

    Args:
        app: The server's.
        running: What runs now, which may change with each request.
        is_broken: Whether that answers chats with 500.
        account_key: What the platform's edge wants in ``Authorization``; empty: it checks nothing.
    """

    def __init__(
        self, app: App, running: Callable[[], Any], is_broken: Callable[[Any], bool], account_key: str = ""
    ) -> None:
        self.app, self.running, self.is_broken = app, running, is_broken
        self.account_key = account_key
        self.seen: Any = None
        self.born = 0.0
        self.never_restarts = False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if (now := self.running()) != self.seen and not self.never_restarts:
                self.seen, self.born = now, time.monotonic()
            sent = dict(scope["headers"]).get(b"authorization", b"").decode()
            if self.account_key and sent != f"Bearer {self.account_key}":
                await answer(send, 401, {"message": "who are you?"})
                return
            if scope["path"] == "/version":
                await self.app(scope, receive, self._newborn(send))
                return
            if self.is_broken(now) and scope["method"] == "POST":
                await answer(send, 500, {"error": {"message": "broken", "type": "x", "param": None, "code": None}})
                return
        await self.app(scope, receive, send)

    def _newborn(self, send: Send) -> Send:
        """Tells the age of the deploy in place of the process's."""
        is_told = False

        async def tell(message: Message) -> None:
            nonlocal is_told
            if message["type"] == "http.response.start" and message["status"] == 200:
                is_told = True
                await answer(send, 200, {"uptime_s": time.monotonic() - self.born, "phases": {}})
            elif not is_told:
                await send(message)

        return tell
