"""Where a model's files will lie on a volume that a platform mounts into its containers.

For those who deploy: plans on their machine, without torch, what is uploaded, what is brought from the Hub, and what
the container is told.  Every folder is named by its commit or its contents, so that a deployed version keeps its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from serve import checkpoint, weights
from serve.errors import HubUnreachable
from serve.settings import EngineName, Settings

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
GB = 1_000_000_000
LORA_PACKAGES = ("peft", "accelerate", "psutil")
RECORDS_PACKAGES = ("aiosqlite", "alembic", "asyncpg", "greenlet", "Mako", "SQLAlchemy")
OIDC_PACKAGES = ("PyJWT", "cryptography", "cffi", "pycparser")
TRACES_PACKAGES = (
    *("opentelemetry-exporter-otlp-proto-http", "opentelemetry-exporter-http-transport", "opentelemetry-sdk"),
    *("opentelemetry-exporter-otlp-common", "opentelemetry-exporter-otlp-proto-common", "opentelemetry-proto"),
    *("opentelemetry-semantic-conventions", "googleapis-common-protos", "protobuf"),
)
"""The extras of these names with what they need in turn, beyond what every image has."""
UNKNOWN_BYTES = 20_000_000_000
"""Taken for a model that nothing is known of: too much rather than too little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One folder on the volume: files of a local ``folder``, or else of ``model`` at the Hub.

    ``names`` are files or patterns.  ``base`` is the base model's target, for a LoRA adapter.
    """

    target: str
    names: tuple[str, ...]
    folder: Path | None = None
    model: str = ""
    revision: str | None = None
    base: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All parts, an adapter's base before it, and the variables that make a container serve from them."""

    parts: tuple[Part, ...] = ()
    variables: dict[str, str]
    num_bytes: int = 0
    is_certain: bool = True
    """Whether ``num_bytes`` is known, not guessed."""
    is_quantized: bool = False
    packages: tuple[str, ...] = ()
    """Pip's names of what these models and settings need beyond ``requirements.lock``."""

    @property
    def gains_from_snapshot(self) -> bool:
        """Whether a memory snapshot shortens a start."""
        return gains_from_snapshot(self.num_bytes, self.is_quantized)

    def environment(self, settings: Settings, template: str) -> tuple[dict[str, str], dict[str, str]]:
        """A container's variables, the public ones and the secret ones.

        Args:
            settings: As given on the machine that deploys.
            template: Where the container will find the operator's chat template.
        """
        from huggingface_hub import get_token  # noqa: PLC0415

        public, secret = settings.environment()
        if token := get_token():
            secret["HF_TOKEN"] = token
        if settings.chat_template is not None:
            public["SERVE_CHAT_TEMPLATE"] = template
        for name in ("SERVE_MODEL_REVISION", "SERVE_EMBEDDING_REVISION"):
            public.pop(name, None)  # the folder is the revision
        return public | self.variables, secret


def place(settings: Settings, mount: str, device_type: str) -> Placement:
    """Find the model and the embedding model, verify what is local, and plan their folders below ``mount``.

    Args:
        settings: As given on the machine that deploys.
        mount: Where the container will find the volume.
        device_type: On what it will serve them: ``cuda`` or ``cpu``.

    Raises:
        ServeError: one cannot be served; with the remedy.  An unreachable Hub is only logged: then the size is
            guessed from the name, and the revision is what the Hub has when the files are brought.
    """
    found: list[_Found] = []
    variables: dict[str, str] = {}
    if settings.engine is EngineName.TRANSFORMERS:
        weights.check_name(settings.model)
        found.append(_find(mount, settings.model, settings.model_revision, settings, device_type, is_chat=True))
        variables |= {"SERVE_MODEL": found[-1].parts[-1].target, "SERVE_MODEL_NAME": settings.served_name}
    if settings.embedding_model and settings.engine is not EngineName.REMOTE:
        weights.check_name(settings.embedding_model, "SERVE_EMBEDDING_MODEL")
        name, revision = settings.embedding_model, settings.embedding_revision
        found.append(_find(mount, name, revision, settings, device_type, is_chat=False))
        variables |= {
            "SERVE_EMBEDDING_MODEL": found[-1].parts[-1].target,
            "SERVE_EMBEDDING_MODEL_NAME": settings.embedding_name,
        }
    if found:
        variables["HF_HUB_OFFLINE"] = "1"
    packages = [name for one in found for name in one.packages]
    packages += RECORDS_PACKAGES if settings.records_url else ()
    packages += OIDC_PACKAGES if settings.oidc_issuer else ()
    packages += TRACES_PACKAGES if settings.traces_url else ()
    return Placement(
        parts=tuple(dict.fromkeys(part for one in found for part in one.parts)),
        variables=variables,
        num_bytes=sum(one.num_bytes for one in found),
        is_certain=all(one.is_certain for one in found),
        is_quantized=any(one.is_quantized for one in found),
        packages=tuple(dict.fromkeys(packages)),
    )


def gains_from_snapshot(num_bytes: int, is_quantized: bool) -> bool:
    """Whether a memory snapshot shortens a start.

    Below 10 GB most of a start is imports; above, reading a snapshot takes longer than reading the files.
    """
    return not is_quantized and num_bytes < 10 * GB


def host_memory_mib(num_bytes: int, has_gpu: bool, has_snapshot: bool) -> int:
    """MiB of main memory that a container needs for ``num_bytes`` of weights.

    They are in it where they pass through it: for a snapshot, and (twice, as float32) without a GPU.
    """
    share = 2.5 if not has_gpu else 1.25 if has_snapshot else 0.25
    return -(-int(4096 + num_bytes / 2**20 * share) // 256) * 256


def host_cores(num_bytes: int, has_gpu: bool) -> float:
    """Cores that a container needs: more where more bytes are to be read."""
    return 2.0 + min(6, num_bytes // (8 * GB)) if has_gpu else 8.0


@contextmanager
def staged(part: Part) -> Generator[Path]:
    """A folder of links to exactly the files of a local part, ready to be uploaded."""
    if part.folder is None:
        raise ValueError(f"{part.model} comes from the Hub")
    with tempfile.TemporaryDirectory(prefix="trimaran-upload-") as name:
        for file in part.names:
            Path(name, file).parent.mkdir(exist_ok=True)
            Path(name, file).symlink_to((part.folder / file).resolve())
        if part.base:
            adapter = Path(name, ADAPTER_CONFIG)
            config = json.loads(adapter.read_text(encoding="utf-8")) | {"base_model_name_or_path": part.base}
            adapter.unlink()
            adapter.write_text(json.dumps(config), encoding="utf-8")
        yield Path(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """One model: its parts, the one that is served last."""

    parts: tuple[Part, ...]
    num_bytes: int
    is_certain: bool = True
    is_quantized: bool = False
    packages: tuple[str, ...] = ()


def _find(
    mount: str, model: str, revision: str | None, settings: Settings, device_type: str, *, is_chat: bool
) -> _Found:
    trusts_code = settings.trust_remote_code
    try:
        source = weights.locate(model, revision, trusts_code)
    except HubUnreachable as error:
        logger.warning("%s The revision is not pinned, and the size is guessed.", error.message)
        part = _hub_part(mount, model, revision, (*weights.SERVED_FILES, "*.py"))
        return _Found(parts=(part,), num_bytes=_guess(model), is_certain=False)
    if is_chat and find_spec("transformers"):  # those who only deploy need not have it
        checkpoint.check_architecture(source.config, trusts_code)
    parts: list[Part] = []
    for one in (source, source.adapter_source):
        if one is not None:
            base = parts[-1].target if parts else ""
            parts.append(_part(mount, one, weights.needed_files(one, trusts_code), base))
    packages = [name for _, name in checkpoint.quantization_packages(source.config, device_type)]
    return _Found(
        parts=tuple(parts),
        num_bytes=source.num_bytes,
        is_quantized=checkpoint.is_quantized(source.config),
        packages=(*packages, *(LORA_PACKAGES if source.adapter else ())),
    )


def _part(mount: str, source: weights.ModelSource, names: tuple[str, ...], base: str) -> Part:
    if source.origin != "local":
        return _hub_part(mount, source.model, source.revision, names, base)
    weights.fetch_weights(source)  # verifies them
    # The base counts too: its address is written into the adapter's files.
    target = f"{mount}/{source.folder.resolve().name}-{_digest(source.folder, names, base)}"
    return Part(target=target, names=names, folder=source.folder, base=base)


def _hub_part(mount: str, model: str, revision: str | None, names: tuple[str, ...], base: str = "") -> Part:
    version = (revision or "default").replace("/", "--")
    if base:
        version += "-on-" + hashlib.sha256(base.encode()).hexdigest()[:12]
    target = f"{mount}/{model.replace('/', '--')}/{version}"
    return Part(target=target, names=names, model=model, revision=revision, base=base)


def _digest(folder: Path, names: tuple[str, ...], base: str) -> str:
    total = hashlib.sha256(base.encode())
    for name in names:
        with (folder / name).open("rb") as file:
            total.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:12]


def _guess(model: str) -> int:
    """Bytes of weights, at two for each of the parameters that the name speaks of."""
    found = re.search(r"(\d+(?:\.\d+)?)([bm])\b", model.lower())
    return int(float(found[1]) * {"b": 2e9, "m": 2e6}[found[2]]) if found else UNKNOWN_BYTES
