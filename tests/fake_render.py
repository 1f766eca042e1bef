"""Render's control plane on loopback, as far as a deploy sees it; bodies are parsed by Render's own client's models."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from render.public_api.models.create_deploy_body import CreateDeployBody
from render.public_api.models.rollback_deploy_body import RollbackDeployBody
from render.public_api.models.service_patch import ServicePATCH
from render.public_api.models.service_post import ServicePOST
from render.public_api.models.web_service_details_patch import WebServiceDetailsPATCH
from render.public_api.models.web_service_details_post import WebServiceDetailsPOST

KEY = "rnd_" + "k" * 24
Json = dict[str, Any]


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeRender:
    """Services by id, deploys newest first.  A deploy passes through ``stages``, one for each time it is asked for.

    ``address`` is where new services are reached; ``refuses`` holds the last part of paths that get 500.
    """

    def __init__(self) -> None:
        self.url = self.address = ""
        self.refuses: set[str] = set()
        self.owners = [{"id": "tea-1", "name": "mine"}]
        self.services: dict[str, Json] = {}
        self.variables: dict[str, dict[str, str]] = {}
        self.deploys: dict[str, list[Json]] = {}
        self.stages = ["update_in_progress", "live"]
        self.requests: list[tuple[str, str, Any]] = []
        self.lines: list[Json] = []
        for number in range(3):
            self.say(f"line {number}")

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        self.requests.append((method, path, body))
        match method, path.strip("/").split("/"):
            case "GET", ["owners"]:
                return 200, [{"owner": owner, "cursor": "c"} for owner in self.owners]
            case "GET", ["services"]:
                found = [s for s in self.services.values() if s["name"] in query.get("name", [s["name"]])]
                return 200, [{"service": service, "cursor": "c"} for service in found]
            case "POST", ["services"]:
                return 201, self._create(body)
            case "PATCH", ["services", service_id]:
                _read(ServicePATCH, body)
                service = self.services[service_id]
                service["serviceDetails"] |= body.get("serviceDetails", {})
                service["imagePath"] = body.get("image", service)["imagePath"]
                return 200, service
            case "DELETE", ["services", service_id]:
                del self.services[service_id]
                return 204, None
            case _, ["services", service_id, "env-vars", *name]:
                return self._variables(method, self.variables[service_id], name[0] if name else "", body)
            case "POST", ["services", service_id, "deploys"]:
                _read(CreateDeployBody, body)
                return 201, self._deploy(service_id, body.get("imageUrl", "built"))
            case "POST", ["services", service_id, "rollback"]:
                _read(RollbackDeployBody, body)
                old = next(d for d in self.deploys[service_id] if d["id"] == body["deployId"])
                return 201, self._deploy(service_id, old["image"]["ref"])
            case "GET", ["services", service_id, "deploys"]:
                return 200, [{"deploy": deploy, "cursor": "c"} for deploy in self.deploys[service_id]]
            case "GET", ["services", service_id, "deploys", deploy_id]:
                return 200, self._advance(service_id, deploy_id)
            case "GET", ["logs"]:
                assert query["resource"][0] in self.services
                assert query["ownerId"] == ["tea-1"]
                return 200, self._logs({name: values[0] for name, values in query.items()})
            case _:
                raise Refused(404, f"not found: {method} {path}")

    def _variables(self, method: str, variables: dict[str, str], name: str, body: Any) -> tuple[int, Any]:
        if not name:
            return 200, [{"envVar": {"key": key, "value": value}, "cursor": key} for key, value in variables.items()]
        if method == "DELETE":
            del variables[name]
            return 204, None
        if method == "PUT":
            variables[name] = body["value"]
        return 200, {"key": name, "value": variables[name]}

    def _logs(self, query: dict[str, str]) -> Json:
        """A page; both ends of the window belong to it."""
        first, last = query.get("startTime", ""), query.get("endTime", "~")
        lines = [line for line in self.lines if first <= line["timestamp"] <= last]
        if query["direction"] == "backward":
            lines.reverse()
        page, rest = lines[: int(query["limit"])], lines[int(query["limit"]) :]
        following = {"nextStartTime": first, "nextEndTime": last}
        if rest:
            following["nextEndTime" if query["direction"] == "backward" else "nextStartTime"] = rest[0]["timestamp"]
        return {"hasMore": bool(rest), "logs": page, **following}

    def say(self, text: str) -> None:
        """One more line of the log."""
        at = len(self.lines)
        self.lines.append({"id": f"l{at}", "timestamp": f"t{at}", "message": text, "labels": []})

    def _create(self, body: Json) -> Json:
        parsed = _read(ServicePOST, body)
        if any(service["name"] == parsed.name for service in self.services.values()):
            raise Refused(409, "name is taken")
        service_id = f"srv-{len(self.services)}"
        details = body["serviceDetails"] | {"url": self.address or f"https://{parsed.name}.onrender.com"}
        self.services[service_id] = {
            "id": service_id, "name": parsed.name, "ownerId": parsed.owner_id, "suspended": "not_suspended",
            "serviceDetails": details, "imagePath": body.get("image", {}).get("imagePath"),
        }  # fmt: skip
        self.variables[service_id] = {v["key"]: v.get("value", "generated") for v in body["envVars"]}
        deploy = self._deploy(service_id, body.get("image", {}).get("imagePath", "built"))
        return {"service": self.services[service_id], "deployId": deploy["id"]}

    def _deploy(self, service_id: str, ref: str) -> Json:
        deploys = self.deploys.setdefault(service_id, [])
        number = sum(map(len, self.deploys.values()))
        deploys.insert(0, {"id": f"dep-{number}", "status": "created", "image": {"ref": ref}, "asked": 0})
        return deploys[0]

    def _advance(self, service_id: str, deploy_id: str) -> Json:
        deploy = next(d for d in self.deploys[service_id] if d["id"] == deploy_id)
        if deploy["status"] in {"live", "deactivated", "update_failed"}:  # it stays so
            return deploy
        deploy["status"] = self.stages[min(deploy["asked"], len(self.stages) - 1)]
        deploy["asked"] += 1
        if deploy["status"] == "live":
            for other in self.deploys[service_id]:
                if other is not deploy and other["status"] == "live":
                    other["status"] = "deactivated"
        return deploy


def _read(model: Any, body: Json) -> Any:
    """The body as Render's own client reads it: every field is one that it knows, with a value that it knows.

    The details are read as those of a web service: the client takes the first of its models that does not fail.
    """
    parsed = model.from_dict(json.loads(json.dumps(body)))
    written = parsed.to_dict()
    if "serviceDetails" in body:
        details = WebServiceDetailsPOST if model is ServicePOST else WebServiceDetailsPATCH
        read = details.from_dict(json.loads(json.dumps(body["serviceDetails"])))
        _check_known(read)
        written["serviceDetails"] = read.to_dict()
    _check_known(parsed)
    if not _contains(written, body):
        raise AssertionError(f"{written} lacks something of {body}")
    return parsed


def _contains(written: Json, sent: Json) -> bool:
    return all(
        _contains(written[key], value) if isinstance(value, dict) else written[key] == value
        for key, value in sent.items()
    )


def _check_known(parsed: Any) -> None:
    if unknown := getattr(parsed, "additional_properties", {}):
        raise AssertionError(f"{type(parsed).__name__} has no {unknown}")


@contextmanager
def serving_render() -> Iterator[FakeRender]:
    """Answers until the end of the block."""
    fake = FakeRender()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(size)) if size else None
            target = urlsplit(self.path)
            try:
                if self.headers.get("Authorization") != f"Bearer {KEY}":
                    raise Refused(401, "unauthorized")
                if target.path.rpartition("/")[2] in fake.refuses:
                    raise Refused(500, "not today")
                status, value = fake.answer(self.command, target.path, parse_qs(target.query), body)
            except Refused as refusal:
                status, value = refusal.status, {"id": "e", "message": str(refusal)}
            except (AssertionError, KeyError, ValueError) as error:
                status, value = 400, {"id": "e", "message": f"as Render's client reads it: {error}"}
            data = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
