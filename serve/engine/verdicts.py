"""Keeps what a comparison of a model with itself found, so that the next start need not repeat it.

Torch-free.  No folder is ever required: what cannot be read or written there is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_SOURCES = (
    *("attention", "blocks", "compiled", "flash", "gate", "kv_cache", "packed", "parts", "patterns", "scheduler"),
    *("survey", "tiles"),
)
"""Modules of the engine whose change makes a comparison void."""

BESIDE = ".trimaran"
"""Below a model's folder: verdicts that were made when the folder was baked into an image."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason`` says why the model cannot run in batches, None that it can; ``off_by`` how exact that was."""

    reason: str | None
    off_by: float | None


class VerdictFile:
    """One verdict on disk, named after everything it depends on; read from beside the model, too.

    Args:
        cache_dir: Where it is kept; None keeps nothing.
        folders: The model's and its adapter's.
        facts: Whatever else matters: versions, number format, device.
    """

    def __init__(self, cache_dir: Path | None, folders: Iterable[Path], facts: Iterable[str]) -> None:
        models = tuple(folders)
        name = f"batching/{_fingerprint(models, facts)}.json"
        self._path = cache_dir / name if cache_dir else None
        self._readable = [*([self._path] if self._path else []), *(model / BESIDE / name for model in models)]

    def read(self) -> Verdict | None:
        """What an earlier start, or whoever baked the model, found; None when nothing can be read."""
        for path in self._readable:
            try:
                stored: Any = json.loads(path.read_text(encoding="utf-8"))
                return Verdict(stored["reason"], stored["off_by"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def write(self, verdict: Verdict) -> None:
        """Keep it; a folder that cannot be written is no error."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(verdict), file)
            Path(name).chmod(0o644)  # an image is built by another user than the one that serves
            Path(name).replace(self._path)
        except OSError as error:
            logger.info("The comparison is not kept for the next start: %s", error)


def _fingerprint(folders: Iterable[Path], facts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.name in {"config.json", "adapter_config.json"} or path.suffix == ".py":
                digest.update(path.read_bytes())
            elif path.is_file():
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    for fact in facts:
        digest.update(f"{fact}\n".encode())
    return digest.hexdigest()
