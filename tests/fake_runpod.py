"""RunPod's REST API v2 on loopback, as far as a deploy sees it; bodies are validated by the published schema."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema_rs

KEY = "rpa_" + "K" * 32
SCHEMA = json.loads((Path(__file__).parent / "platforms" / "runpod_v2_schema.json").read_text(encoding="utf-8"))
Json = dict[str, Any]


def validator(name: str) -> Any:
    return jsonschema_rs.Draft202012Validator({**SCHEMA, "$ref": f"#/components/schemas/{name}"})


CREATE, UPDATE = validator("CreateEndpointRequest"), validator("UpdateEndpointRequest")


def gpu(name: str, pool: str, price: float) -> Json:
    """A type of GPU as the catalogue's published example has it."""
    prices = {"secure": price / 2, "community": price / 3, "serverless": price}
    shape = {"manufacturer": "NVIDIA", "memory": 24, "secure": True, "community": True, "availability": "HIGH"}
    return {"id": name, "name": name, "pool": pool, **shape, "price": prices, "maxCount": {"secure": 8, "community": 4}}


class Refused(Exception):
    """A problem+json answer."""

    def __init__(self, status: int, title: str, detail: str, errors: list[str] | None = None) -> None:
        super().__init__(detail)
        self.body = {"title": title, "status": status, "detail": detail, **({"errors": errors} if errors else {})}


class FakeRunpodApi:
    """Endpoints by id.  ``failures`` are statuses (or seconds of silence, as floats) for the next requests.

    ``base`` is where new load balancers are reached, ``queue`` queues; ``refuses`` are methods that get 400.
    """

    def __init__(self) -> None:
        self.url = ""
        self.key = KEY
        self.base = "https://x.api.runpod.ai"
        self.queue = "https://api.runpod.ai/v2/x"
        self.refuses: set[str] = set()
        self.endpoints: dict[str, Json] = {}
        self.releases: dict[str, list[Json]] = {}
        self.failures: list[int | float] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.lines = ["Ready after 3 s"]
        self.workers: list[Json] = [{"id": "w1", "status": "IDLE", "isStale": False, "gpuCount": 1}]

    def log_events(self, after: str) -> str:
        """The lines from the event ``after`` on, itself included; the stream then ends, as it does now and then."""
        times = [f"2026-08-18T00:00:{at:02}Z" for at in range(len(self.lines))]
        data = [{"source": "container", "line": line, "ts": at} for line, at in zip(self.lines, times, strict=True)]
        return "".join(f"id: {one['ts']}\ndata: {json.dumps(one)}\n\n" for one in data if one["ts"] >= after)

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.requests.append((method, path, body))
        if method in self.refuses:
            raise Refused(400, "Bad Request", "not today")
        match method, path.strip("/").split("/")[1:]:
            case "GET", ["serverless"]:
                return 200, {"endpoints": list(self.endpoints.values())}
            case "GET", ["catalog", "gpus"]:
                return 200, {
                    "gpus": [gpu("NVIDIA GeForce RTX 4090", "ADA_24", 1.1), gpu("NVIDIA H200", "HOPPER_141", 5.5)]
                }
            case "POST", ["serverless"]:
                return 201, self.create(body)
            case "GET", ["serverless", endpoint_id]:
                return 200, self.endpoints[endpoint_id]
            case "PATCH", ["serverless", endpoint_id]:
                return 200, self._update(endpoint_id, body)
            case "DELETE", ["serverless", endpoint_id]:
                del self.endpoints[endpoint_id]
                return 204, None
            case "GET", ["serverless", endpoint_id, "workers"]:
                return 200, {"workers": self.workers, "summary": {}, "endpointVersion": 1}
            case "GET", ["serverless", endpoint_id, "releases"]:
                return 200, {"releases": self.releases[endpoint_id], "rollout": {}}
            case _:
                raise Refused(404, "Not Found", f"no route {method} {path}")

    def create(self, body: Json) -> Json:
        _check(CREATE, body)
        if ("gpu" in body) == ("cpu" in body):
            raise Refused(400, "Bad Request", "exactly one of gpu and cpu")
        endpoint_id = f"ep{len(self.endpoints)}"
        base = {"base": self.base, "health": f"{self.base}/ping"}
        run = {"run": f"{self.queue}/run"}
        urls = base if body["type"] == "LOAD_BALANCER" else run
        self.endpoints[endpoint_id] = {"flashboot": "OFF", **body, "id": endpoint_id, "requestUrls": urls}
        self.releases[endpoint_id] = [{"id": "r1", "version": 1, "createdAt": "2026-08-18T00:00:00Z", "diff": []}]
        return self.endpoints[endpoint_id]

    def _update(self, endpoint_id: str, body: Json) -> Json:
        _check(UPDATE, body)
        endpoint = self.endpoints[endpoint_id]
        if "image" in body and body["image"] != endpoint["image"]:
            change = {"field": "template.imageName", "old": endpoint["image"], "new": body["image"]}
            releases = self.releases[endpoint_id]
            releases.insert(0, {**releases[-1], "version": len(releases) + 1, "diff": [change]})
        merged = {name: {**endpoint[name], **body[name]} for name in ("workers", "gpu") if name in body}
        if "gpu" in body and "pools" in body["gpu"] and "excludedTypes" not in body["gpu"]:
            merged["gpu"].pop("excludedTypes", None)
        endpoint.update(body)
        endpoint.update(merged)
        return endpoint


def _check(validator: Any, body: Any) -> None:
    errors = [f"$.{'.'.join(map(str, error.instance_path))}: {error.message}" for error in validator.iter_errors(body)]
    if errors:
        raise Refused(422, "Unprocessable Entity", "request validation failed", errors)


@contextmanager
def serving_runpod_api() -> Iterator[FakeRunpodApi]:
    """The API on a free port."""
    fake = FakeRunpodApi()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            if fake.failures:
                failure = fake.failures.pop(0)
                if isinstance(failure, float):
                    time.sleep(failure)
                else:
                    headers = {"retry-after": "0"}
                    self.send(failure, {"title": "Oops", "status": failure, "detail": "on order"}, headers)
                    return
            if self.headers.get("authorization") != f"Bearer {fake.key}":
                self.send(401, {"title": "Unauthorized", "status": 401, "detail": "bad key"})
            elif self.path.partition("?")[0].endswith("/logs"):
                after = self.headers.get("last-event-id", "")
                self.send(200, fake.log_events(after).encode(), {"content-type": "text/event-stream"})
            else:
                try:
                    self.send(*fake.answer(self.command, self.path.partition("?")[0], json.loads(raw or b"null")))
                except Refused as refused:
                    self.send(refused.body["status"], refused.body)

        do_GET = do_POST = do_PATCH = do_DELETE = respond  # noqa: N815 - as the base class names them

        def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"content-type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as the base class names it
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
