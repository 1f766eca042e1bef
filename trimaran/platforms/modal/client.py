"""Modal's own ``modal`` command as a subprocess.  The client's protocol is private and changes; its command does not.

Account, environment and profile are those of the command: ``~/.modal.toml`` or ``MODAL_*`` variables.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from serve.errors import ConfigError, ServeError

ADAPTER = Path(__file__).resolve().parents[3] / "deploy/modal/app.py"
TIMEOUT_S = 120.0
SAID_CHARS = 600
ADDRESS = re.compile(r"https?://[\w.:-]+\.modal\.(?:run|direct)\S*")
PAGE = re.compile(r"View Deployment:\s*(\S+)")
NO_ACCOUNT = re.compile(r"token missing|token id|not authenticated|could not authenticate|invalid token", re.I)
NO_APP = re.compile(r"No App with name|is not deployed|not found", re.I)

Json = dict[str, Any]


def check_adapter() -> None:
    """Refuse where there is no checkout.

    Raises:
        ConfigError: with the remedy.
    """
    if not ADAPTER.exists():
        raise ConfigError(f"{ADAPTER} is not there: run this from a checkout of Trimaran")


def deploy(arguments: tuple[str, ...], environment: Mapping[str, str], show: Callable[[str], None]) -> str:
    """Run ``modal deploy deploy/modal/app.py``, each line to ``show`` as it comes; the app's address.

    Raises:
        ServeError: the deploy was refused or failed; Modal has said why.
    """
    said = ""
    with _start(["deploy", str(ADAPTER), *arguments], {**os.environ, **environment}) as process:
        for line in process.stdout or ():
            said += line
            show(line)
    if process.returncode != 0:
        raise _failure(said, "the deploy was refused or failed; the reason is above")
    found = ADDRESS.findall(said) or PAGE.findall(said)
    return found[-1] if found else ""


def history(name: str) -> list[Json]:
    """An app's deployments, newest first: ``version`` (``v3``), ``time_deployed``, ``commit``."""
    return _json(["app", "history", name, "--json"])


def info(name: str) -> Json:
    """Lifecycle, functions and servers of an app."""
    return _json(["app", "info", name, "--json"])


def containers(app_id: str) -> list[Json]:
    """Those that run."""
    return _json(["container", "list", "--app-id", app_id, "--json"])


def rollback(name: str, version: str | None) -> None:
    """Deploy an earlier version again, as a new one; without ``version`` the one before the newest."""
    _output(["app", "rollback", name, *([version] if version else [])])


def logs(name: str, tail: int, *, follow: bool) -> Iterator[str]:
    """The last ``tail`` lines with their times; then, with ``follow``, those that come.

    Raises:
        ServeError: Modal's command failed.
    """
    yield from _output(["app", "logs", name, "--timestamps", "--tail", str(tail)]).splitlines()
    if not follow:
        return
    with _start(["app", "logs", name, "--timestamps", "--follow"], dict(os.environ)) as process:
        last = ""
        try:
            for line in process.stdout or ():
                last = line
                yield line.rstrip("\n")
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode > 0:
        raise _failure(last, f"the logs broke off: {last.strip()}")


def _start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    if find_spec("modal") is None:
        raise ConfigError("Modal's client is not installed.  Run: pip install 'trimaran[modal]' (or -e '.[modal]')")
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "modal", *arguments],
        env={**environment, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _output(arguments: list[str]) -> str:
    with _start(arguments, dict(os.environ)) as process:
        try:
            said, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise ServeError(f"modal {' '.join(arguments[:2])} gave no answer in {TIMEOUT_S:.0f} s") from None
    if process.returncode != 0:
        text = " ".join(said.replace("│", " ").replace("─", "").split())
        raise _failure(said, f"modal {' '.join(arguments[:2])}: {text[-SAID_CHARS:]}")
    return said


def _json(arguments: list[str]) -> Any:
    said = _output(arguments)
    at = min((found for mark in "[{" if (found := said.find(mark)) >= 0), default=len(said))
    try:
        return json.loads(said[at:])
    except ValueError:
        raise ServeError(f"modal {' '.join(arguments[:2])} answered no JSON: {said[:200]}") from None


def _failure(said: str, message: str) -> ServeError:
    """Of the user's making, or not, as far as Modal's words tell."""
    if NO_ACCOUNT.search(said):
        remedy = "Modal knows no account here.  Run: modal setup, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"
        return ConfigError(f"{message}\n{remedy}")
    return ConfigError(message) if NO_APP.search(said) else ServeError(message)
