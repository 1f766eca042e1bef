"""A stand-in for the Hugging Face Hub on loopback, for the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OLD, NEW = "a" * 40, "b" * 40


class Hub:
    """Repositories by name: branches and commits, each commit's files.

    ``refusal`` (status and error code) answers everything; weights break off after ``cut_after`` bytes.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.refusal: tuple[int, str] | None = None
        self.cut_after: int | None = None
        self.requests: list[str] = []
        self.credentials: set[str] = set()
        self.ranges: set[str] = set()
        self.port = 0

    def publish(self, name: str, files: dict[str, bytes], commit: str = NEW) -> None:
        self.commits.setdefault(name, {})[commit] = files
        self.branches.setdefault(name, {})["main"] = commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for one request."""
        if self.refusal:
            return self.refusal[0], {"X-Error-Code": self.refusal[1]}, b"{}"
        parts = path.split("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        if name not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.branches[name].get(revision, revision)
        files = self.commits[name].get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if is_api and rest[:1] == ["tree"]:
            return 200, {}, json.dumps([entry(path, data) for path, data in files.items()]).encode()
        if is_api:
            siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
        data = files["/".join(rest[2:])]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{digest(data)}"'}, data


def digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": digest(data)}


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A Hub that answers until the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            hub.requests.append(f"{self.command} {self.path.split('?')[0]}")
            hub.credentials.add(self.headers.get("Authorization", ""))
            asked = self.headers.get("Range", "bytes=0-")
            hub.ranges.add(asked)
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin = int(first)
            body = body[: int(last) + 1] if last else body
            self.send_response(206 if (begin or last) and status == 200 else status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            is_weights = self.path.endswith(".safetensors") and status == 200
            if self.command == "GET":
                self.wfile.write(body[begin : hub.cut_after if is_weights else None])
                self.close_connection = is_weights and hub.cut_after is not None

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
