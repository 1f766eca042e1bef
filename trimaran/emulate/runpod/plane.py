"""The control plane as one ASGI app: routes, key, faults, and what it saw."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from trimaran.emulate.runpod.client_api import ClientApi
from trimaran.emulate.runpod.faults import Faults
from trimaran.emulate.runpod.jobs import Board
from trimaran.emulate.runpod.worker_api import WorkerApi

SWEEP_S = 0.1


class Gate:
    """Checks the key, carries out faults, and notes every request."""

    def __init__(self, app: ASGIApp, key: str, faults: Faults, log: deque[tuple[float, str]]) -> None:
        self._app = app
        self._key = key
        self._faults = faults
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parts = scope["path"].split("/")
        route = parts[3].removesuffix("-batch") if len(parts) > 3 else ""
        self._log.append((time.monotonic(), route))
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        if not hmac.compare_digest(given, self._key.encode()):
            await JSONResponse({"error": "unauthorized"}, 401)(scope, receive, send)
            return
        if fault := self._faults.next(route):
            await asyncio.sleep(fault.delay_s)
            if fault.status is not None:
                await JSONResponse({"error": "a fault on order"}, fault.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Plane:
    """The app and its state.

    Args:
        endpoint: The endpoint's id.
        key: The API key, for callers and workers alike.
        long_poll_s: How long take and stop are held open.
        dead_after_s: Seconds without a ping after which a worker is dead.
    """

    def __init__(
        self, endpoint: str = "local", key: str = "local-key", *, long_poll_s: float = 20.0, dead_after_s: float = 30.0
    ) -> None:
        self.endpoint = endpoint
        self.key = key
        self.board = Board(dead_after_s=dead_after_s)
        self.faults = Faults()
        self.log: deque[tuple[float, str]] = deque(maxlen=100_000)
        app = Starlette(routes=self._routes(long_poll_s), lifespan=self._lifespan)
        self.app: ASGIApp = Gate(app, key, self.faults, self.log)

    def _routes(self, long_poll_s: float) -> list[Route]:
        client, worker = ClientApi(self.board), WorkerApi(self.board, long_poll_s)
        both = ["GET", "POST"]
        base = f"/v2/{self.endpoint}"
        return [
            Route(f"{base}/run", client.run, methods=["POST"]),
            Route(f"{base}/runsync", client.runsync, methods=["POST"]),
            Route(f"{base}/status/{{job}}", client.status, methods=both),
            Route(f"{base}/stream/{{job}}", client.stream, methods=both),
            Route(f"{base}/cancel/{{job}}", client.cancel, methods=["POST"]),
            Route(f"{base}/retry/{{job}}", client.retry, methods=["POST"]),
            Route(f"{base}/purge-queue", client.purge, methods=["POST"]),
            Route(f"{base}/health", client.health, methods=["GET"]),
            Route(f"{base}/openai/{{path:path}}", client.openai, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
            Route(f"{base}/job-take/{{worker}}", worker.take, methods=["GET"]),
            Route(f"{base}/job-take-batch/{{worker}}", worker.take, methods=["GET"]),
            Route(f"{base}/job-stop/{{worker}}", worker.stop, methods=["GET"]),
            Route(f"{base}/job-stream/{{worker}}/{{job}}", worker.stream, methods=["POST"]),
            Route(f"{base}/job-done/{{worker}}/{{job}}", worker.done, methods=["POST"]),
            Route(f"{base}/ping/{{worker}}", worker.ping, methods=["GET"]),
        ]

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        del app
        sweeper = asyncio.create_task(self._sweep())
        yield
        sweeper.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.board.sweep()

    def worker_environment(self, url: str, worker: str) -> dict[str, str]:
        """What RunPod sets in the container of a worker, for this plane at ``url``."""
        base = f"{url}/v2/{self.endpoint}"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_PING_INTERVAL": str(max(1000, round(self.board.dead_after_s * 1000 / 4))),
            "RUNPOD_AI_API_KEY": self.key,
            "RUNPOD_POD_ID": worker,
            "RUNPOD_POD_HOSTNAME": worker,
            "RUNPOD_ENDPOINT_ID": self.endpoint,
            # The checks want a GPU and 8.8.8.8.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }
