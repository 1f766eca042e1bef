"""Greedy tokens as they should be: recorded in a file, or asked of the same model on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx2 as httpx

from serve.errors import ConfigError, ModelLoadError
from trimaran.verify.answers import SAME_CHARS
from trimaran.verify.outcome import Outcome, failed, passed
from trimaran.verify.target import COMPLETIONS, Target

PROMPTS = (
    "What is the capital of France?",
    "Count from one to ten in words.",
    "Explain in one sentence why the sky is blue.",
)
TOKENS = 24
START_S = 600.0

Reference = dict[str, str]
"""Prompt to greedy text."""


def record(target: Target) -> Reference:
    """The server's greedy texts now.

    Raises:
        ConfigError: it does not answer them.
    """
    texts: Reference = {}
    for prompt in PROMPTS:
        answer = target.ask("POST", COMPLETIONS, json=target.chat(prompt, TOKENS))
        if answer.status_code != 200:
            raise ConfigError(f"{target.url} answered {answer.status_code} to a prompt of the reference")
        texts[prompt] = answer.json()["choices"][0]["message"]["content"] or ""
    return texts


def write(path: Path, target: Target, texts: Reference) -> None:
    """Keep a reference for later: ``--reference``."""
    path.write_text(json.dumps({"model": target.model, "greedy": texts}, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> Reference:
    """A kept reference.

    Raises:
        ConfigError: the file cannot be read, or is none.
    """
    try:
        body = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        return {str(prompt): str(text) for prompt, text in body["greedy"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is no reference ({error}). Record one: trimaran verify URL --record FILE") from error


def check_golden(target: Target, reference: Reference) -> Outcome:
    """The greedy texts begin as the reference's do."""
    name, different = "golden tokens", list[str]()
    for prompt, wanted in reference.items():
        answer = target.ask("POST", COMPLETIONS, json=target.chat(prompt, TOKENS))
        text = (answer.json()["choices"][0]["message"]["content"] or "") if answer.status_code == 200 else ""
        if text[:SAME_CHARS] != wanted[:SAME_CHARS]:
            different.append(f"{prompt!r}: {text[:40]!r} instead of {wanted[:40]!r}")
    if different:
        return failed(
            name,
            f"another model, template or precision answers: {different[0]}",
            different=different,
        )
    return passed(name, f"{len(reference)} greedy answers are the reference's")


@contextmanager
def local_server(model: str, wait_s: float = START_S) -> Generator[Target]:
    """The same server on this machine, on loopback, with ``model`` (a folder or a Hub id).

    Raises:
        ModelLoadError: it does not start; its log is above.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if name != "PORT" and not name.startswith("SERVE_")}
    environment = own | {"SERVE_MODEL": model, "SERVE_PORT": str(port), "SERVE_LOG_LEVEL": "warning"}
    process = subprocess.Popen([sys.executable, "-m", "serve"], env=environment, stdout=subprocess.DEVNULL)
    try:
        with Target(f"http://127.0.0.1:{port}", "", 120.0) as target:
            began = time.monotonic()
            while not _is_ready(target):
                if process.poll() is not None or time.monotonic() - began > wait_s:
                    raise ModelLoadError(f"{model} could not be served on this machine; its log is above")
                time.sleep(0.2)
            target.model = target.ask("GET", "/v1/models").json()["data"][0]["id"]
            yield target
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(target: Target) -> bool:
    try:
        return target.ask("GET", "/ready").status_code == 200
    except httpx.HTTPError:
        return False
