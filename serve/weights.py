"""Where the model comes from: a folder, the Hub's cache on this machine, or the Hub.  Verified, with the reason logged.

Two stages, so that the tokenizer can load while the weights are still on their way:

1. :func:`locate` brings configuration, tokenizer and chat template (small files);
2. :func:`fetch_weights` brings the weights and checks that each file is whole.

Imports neither torch nor transformers.  Platforms need no code here: their caches are reached through ``HF_HOME``
(or ``HF_HUB_CACHE``), and baked weights through a folder's path.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from serve import hub
from serve.errors import ModelLoadError, ServeError
from serve.weight_files import check_readable, gguf_refusal, read_json, verify_weights, weight_names

logger = logging.getLogger(__name__)

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "*.safetensors.index.json",
    # Of embedding models.
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
)
SERVED_FILES = (*_SMALL_FILES, "*.safetensors")
"""Patterns of all files that a model in one folder is served from, when its own list of them is not known."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where one model's files are.

    ``model`` and ``revision`` (the commit; ``None`` for a folder) name what ``folder`` holds.  ``weight_files``
    are the files in it that hold the weights, and ``num_bytes`` their size, 0 while unknown.  ``config`` is the
    parsed ``config.json``.  For a LoRA adapter all of this describes the base, and ``adapter_source`` the adapter.
    """

    folder: Path
    origin: Literal["local", "cache", "hub"]
    model: str
    revision: str | None
    weight_files: tuple[str, ...]
    num_bytes: int
    config: Mapping[str, Any]
    adapter_source: ModelSource | None = None

    @property
    def adapter(self) -> Path | None:
        """The folder of the LoRA adapter to merge, if any."""
        return self.adapter_source.folder if self.adapter_source else None

    @property
    def tokenizer_folder(self) -> Path:
        """Where tokenizer and chat template are: the adapter's folder if it brings its own."""
        return self.adapter if self.adapter and _has_tokenizer(self.adapter) else self.folder


def check_name(model: str, setting: str = "SERVE_MODEL") -> None:
    """Refuse early what is neither a folder's path nor a Hub id.

    Raises:
        ConfigError: the name is malformed.
    """
    if not _exists(Path(model).expanduser()) and not _looks_like_path(model):
        hub.check_name(model, setting)


def locate(model: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Stage one: find the model and bring everything but the weights.

    Args:
        model: A folder's path, or a Hub id; a folder wins.
        revision: Branch, tag or commit of a Hub model.
        trust_remote_code: Bring the model's Python files too.

    Raises:
        ModelLoadError: not found, not readable, no weights that can be served; with the remedy.
        ConfigError: the name is malformed.
    """
    source = _find(model, revision, trust_remote_code)
    if "peft_type" not in source.config:
        return source
    base = _base_model(source)
    try:
        found = _find(base, source.config.get("revision") or None, trust_remote_code)
    except ServeError as error:
        raise ModelLoadError(
            f"{model} is a LoRA adapter whose base model {base} cannot be used. {error.message}"
        ) from error
    if "peft_type" in found.config:
        raise ModelLoadError(f"{model} is a LoRA adapter of {base}, which is an adapter itself. Merge that one first.")
    logger.info("%s is a LoRA adapter of %s.", model, base)
    return replace(found, adapter_source=source)


def fetch_weights(source: ModelSource) -> ModelSource:
    """Stage two: bring the weights (and the adapter's) and check that every file is whole.

    Returns:
        ``source`` with ``num_bytes`` as found on disk.

    Raises:
        ModelLoadError: the Hub or the disk failed, or a file is missing, unreadable or cut short.
    """
    adapter = fetch_weights(source.adapter_source) if source.adapter_source else None
    started = time.perf_counter()
    if source.origin == "hub":
        logger.info("Bringing %d bytes of %s from the Hub.", source.num_bytes, source.model)
        hub.fetch(source.model, source.revision, source.weight_files)
    num_bytes = verify_weights(source.folder, source.weight_files)
    seconds = time.perf_counter() - started
    logger.info(
        "Weights of %s are complete: %d bytes from %s in %.2f s.", source.model, num_bytes, source.origin, seconds
    )
    return replace(source, num_bytes=num_bytes, adapter_source=adapter)


def needed_files(source: ModelSource, trust_remote_code: bool = False) -> tuple[str, ...]:
    """The names of all files in ``source``'s folder that serving reads, for those who copy it elsewhere."""
    patterns = (*_SMALL_FILES, "*.py") if trust_remote_code else _SMALL_FILES
    small = {path for pattern in patterns for path in source.folder.glob(pattern) if path.is_file()}
    return tuple(sorted({path.relative_to(source.folder).as_posix() for path in small} | set(source.weight_files)))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def _find(model: str, revision: str | None, trust_remote_code: bool) -> ModelSource:
    started = time.perf_counter()
    path = Path(model).expanduser()
    if model and _exists(path):
        if revision:
            logger.warning("%s is a folder: the revision %s does not apply to it.", model, revision)
        source, reason = _describe(path, model), "the folder exists"
    else:
        source, reason = _find_at_hub(model, revision, trust_remote_code)
    seconds = time.perf_counter() - started
    logger.info("Model %s: %s, %s (%s), in %.2f s.", model, source.origin, source.folder, reason, seconds)
    return source


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        # Below a folder that may not be entered: check_readable explains it.
        return True
    except (OSError, ValueError):
        return False


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or (model.count("/") > 1 and "://" not in model)


def _find_at_hub(model: str, revision: str | None, trust_remote_code: bool) -> tuple[ModelSource, str]:
    if _looks_like_path(model):
        raise ModelLoadError(f"{model} does not exist: looked for a folder, and it is not a Hub id (owner/name).")
    hub.check_name(model)
    patterns = (*_SMALL_FILES, "*.py") if trust_remote_code else _SMALL_FILES
    snapshot = hub.open_snapshot(model, revision, patterns, _defect)
    source = _describe(snapshot.folder, model, snapshot.names)
    # Listed by the Hub, and here already: nothing to download.
    is_here = snapshot.from_cache or _defect(snapshot.folder) is None
    return (
        replace(
            source,
            origin="cache" if is_here else "hub",
            revision=snapshot.revision,
            num_bytes=source.num_bytes or snapshot.num_bytes,
        ),
        snapshot.reason,
    )


def _defect(folder: Path) -> str | None:
    """Why a cached folder cannot be served without asking the Hub."""
    try:
        source = _describe(folder, str(folder))
        verify_weights(folder, source.weight_files)
    except ModelLoadError as error:
        return error.message
    if "peft_type" in source.config or _has_tokenizer(folder):
        return None
    return f"{folder} has no tokenizer."


def _describe(folder: Path, model: str, listed: frozenset[str] = frozenset()) -> ModelSource:
    """Read a folder; ``listed`` are files that can still be brought."""
    if not listed:
        check_readable(folder)
    if not listed and not folder.is_dir():
        if folder.suffix == ".gguf":
            raise gguf_refusal(str(folder))
        raise ModelLoadError(f"{folder} is a file: name the folder that holds config.json and the weights.")
    # A repository without any small file leaves no folder.
    here = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    names = here | listed
    config = _config(folder, names, model)
    weight_files = weight_names(folder, config, names, model)
    for name in sorted(here):
        if any(Path(name).match(pattern) for pattern in _SMALL_FILES) or name in weight_files:
            check_readable(folder / name)
    num_bytes = sum((folder / name).stat().st_size for name in weight_files if name in here)
    return ModelSource(
        folder=folder,
        origin="local",
        model=model,
        revision=None,
        weight_files=weight_files,
        num_bytes=num_bytes if here.issuperset(weight_files) else 0,
        config=config,
    )


def _config(folder: Path, names: set[str], model: str) -> dict[str, Any]:
    has_model = any(name.startswith(("model.safetensors", "pytorch_model")) for name in names)
    if "adapter_config.json" in names and not has_model:
        config = read_json(folder / "adapter_config.json")
        if config.get("peft_type") != "LORA":
            raise ModelLoadError(f"{model} is a {config.get('peft_type')} adapter; only LoRA adapters can be merged.")
        return config
    if "config.json" in names:
        return {key: value for key, value in read_json(folder / "config.json").items() if key != "peft_type"}
    if any(name.endswith(".gguf") for name in names):
        raise gguf_refusal(model)
    hint = "is it a model that transformers can load?"
    if "snapshots" in names:
        hint = "it is a folder of the Hub's cache; name the folder below snapshots/, or the Hub id."
    raise ModelLoadError(f"{model} has no config.json: {hint}")


def _base_model(adapter: ModelSource) -> str:
    config = adapter.config
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ModelLoadError(f"{adapter.model} is an adapter for {config['task_type']}; only CAUSAL_LM can be served.")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelLoadError(
            f"{adapter.model} does not say which model it adapts. "
            "Set base_model_name_or_path in its adapter_config.json to a folder or a Hub id."
        )
    return base
