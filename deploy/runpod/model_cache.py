"""Where a worker's weights come from: RunPod's model cache, the image, a network volume, the Hub, in this order.

Only chooses, by the environment, before anything reads it; ``serve.weights`` then finds and verifies the files.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import MutableMapping
from pathlib import Path

from serve.errors import ServeError
from serve.weights import fetch_weights, locate

logger = logging.getLogger("serve.runpod")

CACHE = Path("huggingface-cache", "hub")
"""Below the volume: where RunPod keeps cached models, and where downloads are kept when the volume is our own."""


def choose(environ: MutableMapping[str, str], volume: Path) -> None:
    """Point the settings at the best source of ``SERVE_MODEL``; a copy that is not whole is passed over.

    What a worker finds out about the model stays on a volume that can be written, for the next one.
    """
    if _is_writable(volume) and not environ.get("SERVE_CACHE_DIR"):
        environ["SERVE_CACHE_DIR"] = str(volume / "trimaran")
    model = environ.get("SERVE_MODEL", "")
    if model.count("/") != 1 or Path(model).exists() or "://" in model:  # a folder, or no model at all
        return
    began = time.perf_counter()
    folder, reason = _whole_copy(volume / CACHE, model, environ.get("SERVE_MODEL_REVISION") or "main")
    seconds = time.perf_counter() - began
    if folder is not None:
        environ["SERVE_MODEL"] = str(folder)
        environ.pop("SERVE_MODEL_REVISION", None)
        if not environ.get("SERVE_MODEL_NAME"):
            environ["SERVE_MODEL_NAME"] = model
        logger.info("Weights of %s: %s, whole, in %.2f s", model, folder, seconds)
    elif environ.get("HF_HUB_OFFLINE"):
        logger.info("Weights of %s: the image's own (%s; %s)", model, environ.get("HF_HOME", "HF_HOME"), reason)
    elif _is_writable(volume) and not environ.get("HF_HUB_CACHE"):
        environ["HF_HUB_CACHE"] = str(volume / CACHE)
        logger.info("Weights of %s: from the Hub, kept on the volume %s (%s)", model, volume, reason)
    else:
        logger.info("Weights of %s: from the Hub, for this worker only (%s)", model, reason)


def _whole_copy(cache: Path, model: str, revision: str) -> tuple[Path | None, str]:
    """The complete snapshot of a model in a Hub cache, or why there is none."""
    home = cache / f"models--{model.replace('/', '--')}"
    try:
        ref = home / "refs" / revision
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
        snapshots = [home / "snapshots" / commit]
        if revision == "main" and not ref.is_file() and (home / "snapshots").is_dir():
            snapshots = sorted((home / "snapshots").iterdir())
        if len(snapshots) != 1 or not snapshots[0].is_dir():
            return None, f"{home} has no single snapshot of {revision}"
        if (snapshots[0] / "adapter_config.json").exists():
            return None, f"{snapshots[0]} is an adapter"
        fetch_weights(locate(str(snapshots[0])))
    except (OSError, ServeError) as error:
        return None, f"{home} is not whole: {error}"
    return snapshots[0], ""


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)
