"""The ledger: one line of JSON for each deploy and each rollback, in the project's own folder.

Written by the commands that change something in a cloud, read by ``trimaran history`` and ``trimaran rollback``.  It
holds no secret: values of variables that are named like one are left out of the configuration before it is hashed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, cast

import click

from trimaran.platforms.render.rules import SECRET_NAME

FOLDER, FILE, VARIABLE = ".trimaran", "ledger.jsonl", "TRIMARAN_LEDGER"
MARKS = (FOLDER, "trimaran.toml", ".git")
"""Any of these makes a folder the project's."""

IGNORED = "# The ledger is this machine's own.  To share it, remove this file and commit ledger.jsonl.\n*\n"
LIVE, SENT, FAILED = "live", "sent", "failed"
"""It was seen to run; the platform took it and nobody waited; it never ran."""

PASSED, NOT_PASSED = "passed", "failed"
"""What ``--verify`` found."""

MAX_ERROR_CHARS = 300
MIN_SECRET_CHARS = 6


@dataclass(slots=True, kw_only=True)
class Entry:
    """One deploy or rollback.

    ``artifact`` is the image, with its digest where the platform tells it, or the commit; ``revision`` is what the
    platform calls this deploy; ``configuration`` a hash; ``verify`` is ``passed`` or ``failed`` where the deploy was
    verified; ``restores`` is the number of the entry that a rollback returns to, where the ledger has it; ``number``
    counts a service's entries from 1, and is not kept.
    """

    platform: str
    name: str
    action: str = "deploy"
    time: str = ""
    result: str = SENT
    service: str | None = None
    revision: str | None = None
    artifact: str | None = None
    configuration: str | None = None
    url: str | None = None
    seconds: float | None = None
    error: str | None = None
    verify: str | None = None
    restores: int | None = None
    number: int = 0

    def stored(self) -> dict[str, Any]:
        """Its fields as they are written, without empty ones."""
        fields = dataclasses.asdict(self)
        del fields["number"]
        return {name: value for name, value in fields.items() if value is not None}


FIELDS = {field.name for field in dataclasses.fields(Entry)} - {"number"}


def path() -> Path:
    """``TRIMARAN_LEDGER``, or the file in the project that holds the current folder, or in the current folder."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    here = Path.cwd()
    project = next(
        (folder for folder in (here, *here.parents) if any((folder / mark).exists() for mark in MARKS)), here
    )
    return project / FOLDER / FILE


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """A hash that does not depend on the order of keys; of secrets only the names count."""
    text = json.dumps(_without_secrets(configuration), sort_keys=True, ensure_ascii=False, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, Any]", value)
        if "key" in fields and "value" in fields and SECRET_NAME.search(str(fields["key"])):
            return {"key": fields["key"]}
        return {name: None if SECRET_NAME.search(name) else _without_secrets(inner) for name, inner in fields.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in cast("list[Any]", value)]
    return value


@contextmanager
def recording(
    platform: str, name: str, action: str = "deploy", tell: Callable[[Entry], None] | None = None
) -> Generator[Entry]:
    """Append the entry that the block fills in, also when the block fails.  Never fails itself.

    ``tell`` is then called with the entry.
    """
    entry = Entry(platform=platform, name=name, action=action, time=_now())
    began = time.monotonic()
    try:
        yield entry
    except BaseException as error:
        is_under_way = isinstance(error, KeyboardInterrupt) and entry.revision is not None
        entry.result = SENT if is_under_way else FAILED
        entry.error = masked(str(getattr(error, "message", error)) or type(error).__name__)
        raise
    finally:
        entry.seconds = round(time.monotonic() - began, 1)
        try:
            append(entry)
        except OSError as error:
            click.echo(f"Note: the ledger {path()} could not be written: {error.strerror or error}", err=True)
        if tell is not None:
            tell(entry)


def append(entry: Entry) -> None:
    """Add one line, whole or not at all, whoever else writes at the same time."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.parent.name == FOLDER and not file.exists() and not (file.parent / ".gitignore").exists():
        (file.parent / ".gitignore").write_text(IGNORED, encoding="utf-8")
    line = json.dumps(entry.stored(), ensure_ascii=False).encode() + b"\n"
    with file.open("ab+", buffering=0) as stream:
        _lock(stream)
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":  # a line that broke off must not swallow this one
                line = b"\n" + line
        stream.write(line)


def _lock(stream: FileIO) -> None:
    """Until the file is closed.  Where there is no such lock, one write to a file opened for appending must do."""
    if sys.platform != "win32":
        import fcntl  # noqa: PLC0415

        fcntl.flock(stream, fcntl.LOCK_EX)


def read() -> tuple[list[Entry], list[int]]:
    """All entries, oldest first, and the numbers of the lines that cannot be read.

    Raises:
        OSError: the file is there and cannot be opened.
    """
    try:
        lines = path().read_bytes().splitlines()
    except FileNotFoundError:
        return [], []
    entries: list[Entry] = []
    broken: list[int] = []
    counts: dict[tuple[str, str], int] = {}
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = _entry(line)
        if entry is None:
            broken.append(at)
            continue
        key = (entry.platform, entry.name)
        entry.number = counts[key] = counts.get(key, 0) + 1
        entries.append(entry)
    return entries, broken


def newest(platform: str, name: str, matches: Callable[[Entry], bool]) -> int | None:
    """The number of a service's newest entry that ran and ``matches``; None where the ledger knows of none."""
    try:
        entries, _ = read()
    except OSError:
        return None
    own = [entry for entry in entries if (entry.platform, entry.name) == (platform, name) and entry.result != FAILED]
    return next((entry.number for entry in reversed(own) if matches(entry)), None)


def _entry(line: bytes) -> Entry | None:
    """An entry, also of a later version with more fields; None where it is none."""
    try:
        fields: Any = json.loads(line)
        entry = Entry(**{name: value for name, value in fields.items() if name in FIELDS})
    except (ValueError, TypeError, AttributeError):
        return None
    texts: tuple[Any, ...] = (entry.platform, entry.name, entry.action, entry.time, entry.result)
    return entry if all(isinstance(text, str) for text in texts) else None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def masked(text: str) -> str:
    """The first lines of an error, without the value of any secret of this environment."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name):
            for part in value.split(","):
                if len(part.strip()) >= MIN_SECRET_CHARS:
                    text = text.replace(part.strip(), "***")
    return text.strip()[:MAX_ERROR_CHARS]
