"""The client's side of a trace: wait until a server is ready, read its phases, time a first token."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

from serve.errors import ConfigError, ModelLoadError, ServeError
from trimaran.trace.queue import ask, queue_of
from trimaran.trace.waterfall import Trace, make_trace

POLL_S = 0.2
ANSWER_S = 60.0
WOKEN_S = 0.2
"""A process that is at least so much younger than the request was started by it."""

WAKING = frozenset({408, 429, 500, 502, 503, 504})
"""What platforms answer while they start a container."""

QUESTION = "Say hello."
STOP_S = 30.0


def observe(
    url: str, headers: Mapping[str, str], timeout_s: float, is_alive: Callable[[], bool] = lambda: True
) -> Trace:
    """Wake the server, wait until it is ready or no longer ``is_alive``, ask it for one token.

    Raises:
        ConfigError: the key is wrong, or there is no ``/version``.
        ModelLoadError: the server says that its model cannot be loaded.
        ServeError: it was not ready in ``timeout_s`` seconds, or gave no token.
    """
    queue = queue_of(url)
    base = f"{queue}/openai" if queue else url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=base, headers=dict(headers)) as client:
        asked = time.monotonic()
        if queue:  # a worker takes jobs once its model is loaded
            version = _checked(ask(client, queue, "/version", timeout_s), queue)
        else:
            version = _ready(client, timeout_s, is_alive)
        age = version.get("uptime_s")
        born = time.monotonic() - age if age is not None else asked
        container = born - asked
        first = _first_token(client, str(version["model"]))
        return make_trace(version, round(container, 3) if container > WOKEN_S else None, first)


def _ready(client: httpx.Client, timeout_s: float, is_alive: Callable[[], bool]) -> dict[str, Any]:
    said, deadline = "nothing", time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            response = client.get("/version", timeout=max(1.0, left))
        except httpx.HTTPError as error:
            said = type(error).__name__
        else:
            said = f"status {response.status_code}"
            if response.is_success:
                version = _version(response)
                if version["status"] == "ready":
                    return version
                said = f"{version['status']} {', '.join(version['phases'])}"
                if version["status"] == "dead":
                    raise ModelLoadError(f"the server cannot load its model: {_reason(client)}")
            elif response.status_code in (401, 403):
                raise ConfigError(f"the server answers {response.status_code}: give --key, or set SERVE_API_KEYS")
            elif response.status_code not in WAKING:
                raise ConfigError(f"{response.url} answers {response.status_code}; is this a server of Trimaran's?")
        if not is_alive():
            raise ServeError("the server ended")
        time.sleep(POLL_S)
    raise ServeError(f"the server was not ready in {timeout_s:.0f} s; the last answer: {said}")


def _version(response: httpx.Response) -> dict[str, Any]:
    try:
        said = response.json()
    except ValueError:
        said = None
    return _checked(said, str(response.url))


def _checked(version: Any, where: str) -> dict[str, Any]:
    try:
        _ = version["status"], version["engine"], version["model"], dict(version["phases"])
    except (LookupError, TypeError, ValueError):
        raise ConfigError(f"{where} is no /version of Trimaran's; give the server's own address") from None
    return version


def _reason(client: httpx.Client) -> str:
    try:
        return str(client.get("/health", timeout=ANSWER_S).json().get("message"))
    except (httpx.HTTPError, ValueError, AttributeError):
        return "it does not say why"


def _first_token(client: httpx.Client, model: str) -> float:
    """Seconds from a request to the first piece of its answer."""
    body = {
        **{"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1},
        **{"stream": True, "temperature": 0},
    }
    began = time.monotonic()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body, timeout=ANSWER_S) as response:
            if response.is_error:
                response.read()
                raise ServeError(f"the first request was answered with {response.status_code}: {response.text[:200]}")
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data and data != "[DONE]" and _has_token(json.loads(data)):
                    return time.monotonic() - began
    except (httpx.HTTPError, ValueError) as error:
        raise ServeError(f"the first request failed: {type(error).__name__}: {error}") from error
    raise ServeError("the answer to the first request had no token")


def _has_token(event: dict[str, Any]) -> bool:
    """Whether text came, or the choice has ended (a first token may have no text)."""
    if "error" in event:
        raise ServeError(f"the first request failed: {event['error'].get('message')}")
    choices: list[dict[str, Any]] = event.get("choices") or []
    return any(choice["delta"].get("content") or choice.get("finish_reason") for choice in choices)


@contextmanager
def local_server(model: str | None) -> Generator[tuple[str, dict[str, str], Callable[[], bool]]]:
    """A server of ``model``, or of the environment's settings, on loopback; its address, headers, and whether it lives.

    Raises:
        ServeError: it ended by itself; with its last words, and its exit status where it has a meaning of its own.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = f"sk-{secrets.token_hex(16)}"
    arguments = [f"--model={model}"] if model else []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "serve", "--host=127.0.0.1", f"--port={port}", *arguments],
            env={**os.environ, "SERVE_API_KEYS": key},
            stdout=log,
            stderr=log,
        )
        try:
            _wait_for_port(port, process)
            yield f"http://127.0.0.1:{port}", {"authorization": f"Bearer {key}"}, lambda: process.poll() is None
        except ServeError as error:
            if process.poll() is None or isinstance(error, ModelLoadError):
                raise
            log.seek(0)
            words = log.read()[-1500:].strip()
            failure = {2: ConfigError, 3: ModelLoadError}.get(process.returncode, ServeError)
            raise failure(f"the server ended with status {process.returncode}:\n{words}") from None
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise ServeError("the server ended before its port was open")


def save(path: Path, text: str) -> None:
    """Write a picture.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
