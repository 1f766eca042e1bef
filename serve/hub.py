"""Bring files from the Hugging Face Hub, or from its cache on this machine.

The cached copy is used without network when the revision is a full commit hash or ``HF_HUB_OFFLINE`` is set,
and instead of the Hub when the Hub does not give the model.  ``huggingface_hub`` is imported when first needed.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.errors import ConfigError, HubUnreachable, ModelLoadError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INFO_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One commit of a repository, as far as it is on this machine.

    ``names`` are the repository's files where the Hub was asked, else those in ``folder``.  ``num_bytes`` is
    the size of its ``*.safetensors`` at the Hub, 0 when unknown.
    """

    folder: Path
    revision: str
    from_cache: bool
    reason: str
    names: frozenset[str]
    num_bytes: int = 0


def is_hub_name(model: str) -> bool:
    """Whether ``model`` has the form of a Hub id, ``name`` or ``owner/name``."""
    return bool(_NAME.fullmatch(model)) and ".." not in model and "--" not in model and not model.endswith(".git")


def check_name(model: str, setting: str = "SERVE_MODEL") -> None:
    """Refuse what can be neither a folder nor a Hub id.

    Raises:
        ConfigError: the name is malformed.
    """
    if not is_hub_name(model):
        url = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", model)
        hint = f"write {url[1]}" if url else "write a folder's path, or owner/name as on the Hub"
        raise ConfigError(f"{setting}={model!r} is not a model's name: {hint}.", param=setting)


def open_snapshot(
    model: str, revision: str | None, patterns: Sequence[str], defect: Callable[[Path], str | None]
) -> Snapshot:
    """Bring the files that match ``patterns`` and list the rest.

    Args:
        model: A Hub id.
        revision: Branch, tag or commit; ``None`` is the default branch.
        patterns: Of small files only; weights come with :func:`fetch`.
        defect: Why a cached folder cannot be served as it is, weights included; ``None`` when it can.

    Raises:
        ModelLoadError: the model is neither at the Hub nor complete in the cache.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.constants import HF_HUB_OFFLINE  # noqa: PLC0415

    if HF_HUB_OFFLINE:
        found = _cached(model, revision, patterns, defect, "HF_HUB_OFFLINE is set")
        if isinstance(found, Snapshot):
            return found
        remedy = "HF_HUB_OFFLINE is set: unset it for one start, or name a folder."
        raise ModelLoadError(f"{model}{_at(revision)} cannot be used from the cache. {found} {remedy}")
    if _COMMIT.fullmatch(revision or ""):
        found = _cached(model, revision, patterns, defect, "the revision is a commit and complete")
        if isinstance(found, Snapshot):
            return found
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=_INFO_TIMEOUT_S)
        # The revision as given, not the commit: this also records what a branch points to, for later without network.
        folder = _download(model, revision, patterns)
    except Exception as error:
        problem = _explain(model, revision, error)
        found = _cached(model, revision, patterns, defect, "the Hub did not give it")
        if isinstance(found, Snapshot):
            logger.warning("%s Using the complete copy in the cache, commit %s.", problem.message, found.revision)
            return found
        raise problem from error
    listed = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Snapshot(
        folder=folder,
        revision=folder.name,
        from_cache=False,
        reason="the Hub was asked",
        names=frozenset(listed),
        num_bytes=sum(size for name, size in listed.items() if name.endswith(".safetensors") and "/" not in name),
    )


def fetch(model: str, revision: str | None, names: Sequence[str]) -> Path:
    """Download exactly the files ``names`` of a commit; those already there are kept.

    Raises:
        ModelLoadError: the Hub or the disk failed; nothing half-downloaded is left under a final name.
    """
    try:
        return _download(model, revision, names)
    except Exception as error:
        raise _explain(model, revision, error) from error


def read_start(model: str, revision: str | None, name: str, num_bytes: int) -> bytes:
    """The first ``num_bytes`` bytes of a file, or all of a shorter one; the rest is not downloaded.

    Raises:
        ModelLoadError: the Hub did not give it.
    """
    from huggingface_hub import get_session, hf_hub_url  # noqa: PLC0415
    from huggingface_hub.utils import (  # noqa: PLC0415
        build_hf_headers,  # pyright: ignore[reportUnknownVariableType]
        hf_raise_for_status,
    )

    headers = build_hf_headers() | {"Range": f"bytes=0-{num_bytes - 1}"}
    found = bytearray()
    try:
        url = hf_hub_url(model, name, revision=revision)
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            for part in response.iter_bytes():  # a server that ignores the range is not read to the end
                found += part
                if len(found) >= num_bytes:
                    break
    except Exception as error:
        raise _explain(model, revision, error) from error
    return bytes(found[:num_bytes])


def sizes(model: str, revision: str | None) -> dict[str, int]:
    """All files of a repository, and their bytes.

    Raises:
        ModelLoadError: the Hub did not say.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415

    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=_INFO_TIMEOUT_S)
    except Exception as error:
        raise _explain(model, revision, error) from error
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def close_connections() -> None:
    """Close what huggingface_hub keeps open for its next question; that one opens its own."""
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import close_session  # noqa: PLC0415

        close_session()


def _download(model: str, revision: str | None, patterns: Sequence[str], local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # pyright: ignore[reportUnknownVariableType]

    return Path(
        snapshot_download(model, revision=revision, allow_patterns=list(patterns), local_files_only=local_files_only)
    )


def _cached(
    model: str, revision: str | None, patterns: Sequence[str], defect: Callable[[Path], str | None], reason: str
) -> Snapshot | str:
    """The cached copy, or why there is none that can be served."""
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        folder = _download(model, revision, patterns, local_files_only=True)
    except LocalEntryNotFoundError:
        # Also what the client says when it may not enter the folder.
        is_closed = os.path.lexists(HF_HUB_CACHE) and not os.access(HF_HUB_CACHE, os.R_OK | os.X_OK)
        return f"{HF_HUB_CACHE} " + (f"is not readable by uid {os.getuid()}." if is_closed else "has no complete copy.")
    except Exception as error:
        raise _explain(model, revision, error) from error
    if why := defect(folder):
        return why
    names = frozenset(path.name for path in folder.iterdir())
    return Snapshot(folder=folder, revision=folder.name, from_cache=True, reason=reason, names=names)


def _explain(model: str, revision: str | None, error: Exception) -> ModelLoadError | ConfigError:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return ConfigError(f"SERVE_MODEL={model!r} is not a model's name: {error}", param="SERVE_MODEL")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError):
        text = (
            f"{model} is gated: accept its licence at {ENDPOINT}/{model} and set HF_TOKEN to a token of that account."
        )
    elif isinstance(error, RevisionNotFoundError):
        text = f"{model} has no revision {revision!r}. Set SERVE_MODEL_REVISION to a branch, tag or commit of it."
    elif isinstance(error, RepositoryNotFoundError):
        text = (
            f"{model} was not found: looked for a folder under {Path.cwd()}, and for a public model at {ENDPOINT}. "
            "Check the name; if it is private, set HF_TOKEN."
        )
    elif status in (401, 403):
        text = f"The Hub refused {model} ({status}): set HF_TOKEN to a valid token that may read it."
    elif status:
        text = f"The Hub answered {status} for {model}: try again later, or name a folder."
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"The disk of {HF_HUB_CACHE} is full: free space there, or set HF_HOME to a larger disk."
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        text = (
            f"The cache {HF_HUB_CACHE} is not usable by uid {os.getuid()} ({error.strerror}): "
            "set HF_HOME to a writable folder."
        )
    else:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        return HubUnreachable(
            f"The Hub at {ENDPOINT} cannot be reached for {model} ({reason}). Check the network, or name a folder."
        )
    return ModelLoadError(text)


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""
