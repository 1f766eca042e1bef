"""What the checkpoint behind a GGUF file would need, from its header; of a split file, from those of all parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serve import hub
from serve.errors import ConfigError, ModelLoadError
from trimaran.plan.gguf_header import GgufHeader, read_gguf

if TYPE_CHECKING:
    from trimaran.plan.need import Need

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
NOTE = "the engine serves no GGUF: take the safetensors checkpoint that it was made from, and plan that"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the files are: how many bytes one has, and its first bytes."""

    size: Callable[[str], int]
    start: Callable[[str, int], bytes]


def gguf_need(model: str, revision: str | None, context: int | None, name: str | None) -> Need:
    """The need of a GGUF file: ``model`` itself, or ``name`` in a folder or a repository.

    Raises:
        ServeError: it is not there, or cannot be read.
    """
    path = Path(model).expanduser()
    if name is None or path.is_dir():
        path = path / name if name else path
        place, first = _Place(lambda file: _local(file).stat().st_size, _start_of), str(path)
    else:
        sizes = hub.sizes(model, revision)
        place = _Place(
            lambda file: _listed(sizes, model, file), lambda file, count: hub.read_start(model, revision, file, count)
        )
        first = name
    headers: list[GgufHeader] = []
    size = 0
    for file in _parts(first):
        size += place.size(file)
        headers.append(read_gguf(lambda count, file=file: place.start(file, count), file))
    return _need(headers, name or model, size, context)


def _parts(first: str) -> list[str]:
    """The names of all parts of a split file; of another, its own."""
    found = PART.search(first)
    if not found:
        return [first]
    stem, count = first[: found.start()], int(found[2])
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _local(file: str) -> Path:
    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"{file} does not exist: name a GGUF file (of a split one all parts), or a Hub id with --gguf"
        )
    return path


def _start_of(file: str, count: int) -> bytes:
    try:
        with _local(file).open("rb") as opened:
            return opened.read(count)
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}") from None


def _listed(sizes: dict[str, int], model: str, name: str) -> int:
    if name not in sizes:
        found = ", ".join(sorted(other for other in sizes if other.endswith(".gguf"))) or "none"
        raise ModelLoadError(f"{model} has no file {name}; its GGUF files: {found}")
    return sizes[name]


def _need(headers: list[GgufHeader], name: str, size: int, context: int | None) -> Need:
    from trimaran.plan.need import FORMULA, Need, chosen_context  # noqa: PLC0415

    header = headers[0]
    own = header.number("context_length")
    context = chosen_context(context, own, own)
    heads, hidden = header.number("attention.head_count") or 0, header.number("embedding_length") or 0
    width = hidden // heads if heads else 0
    key = header.number("attention.key_length") or width
    value = header.number("attention.value_length") or width
    layers = header.number("block_count") or 0
    each = header.numbers("attention.head_count_kv")  # a model may have another count in each layer
    kv_heads = sum(each) if each else layers * (header.number("attention.head_count_kv") or heads)
    per_token = kv_heads * (key + value) * 2
    num_bytes = size - sum(one.data_start for one in headers)
    return Need(
        model=name,
        num_parameters=sum(one.num_parameters for one in headers),
        stored_bytes=num_bytes,
        weight_bytes=num_bytes,
        quantization="gguf",
        adapter_bytes=0,
        context=context,
        kv_bytes_per_token=per_token,
        kv_bytes_per_sequence=per_token * context,
        own_cache_bytes=0,
        method=FORMULA,
        runs_in_batches=True,
        hidden_size=hidden,
        vocab_size=header.num_tokens,
        notes=(NOTE,),
    )
