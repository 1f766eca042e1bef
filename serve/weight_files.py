"""Which files hold a checkpoint's weights, and whether each of them is whole.  Headers only; no tensor is read.

Standard library only.  Pickle files are never opened: they can run code.
"""

from __future__ import annotations

import json
import os
import shlex
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, cast

from serve.errors import ModelLoadError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"

# What the safetensors format allows for a header, in bytes.
_MAX_HEADER_BYTES = 100_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ModelLoadError: missing, unreadable, or not a JSON object.
    """
    check_readable(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object; download it again.")
    return cast("dict[str, Any]", value)


def check_readable(path: Path) -> None:
    """Refuse a file or folder that is missing or that this user may not read.

    Checked here because the safetensors library reports a file without read permission as not found.

    Raises:
        ModelLoadError: says which of the two, for which uid, and the remedy.
    """
    try:
        exists = path.exists()
    except OSError as error:
        # A parent folder without execute permission hides what is below it.
        raise ModelLoadError(f"{path} cannot be looked up by uid {os.getuid()} ({error.strerror}).") from None
    if not exists:
        why = f"is a link to {path.readlink()}, which is missing" if path.is_symlink() else "does not exist"
        raise ModelLoadError(f"{path} {why}; download it again.")
    mode = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    if not os.access(path, mode):
        remedy = f"chmod -R a+rX {shlex.quote(str(path))}"
        raise ModelLoadError(f"{path} exists but is not readable by uid {os.getuid()}. Run: {remedy}")


def weight_names(folder: Path, config: Mapping[str, Any], names: Iterable[str], model: str) -> tuple[str, ...]:
    """The weight files that a loader of this checkpoint reads, in order.

    Args:
        folder: The checkpoint; a sharded one's index must be there already.
        config: Its ``config.json``, or ``adapter_config.json``.
        names: The files that exist, here or at the Hub.
        model: What messages call it: a path or a Hub id.

    Raises:
        ModelLoadError: there are none that can be served, and what there is instead.
    """
    present = set(names)
    if "peft_type" in config:
        wanted = ADAPTER
    else:
        explicit = config.get("transformers_weights")
        wanted = explicit if isinstance(explicit, str) else SINGLE if SINGLE in present else INDEX
    if wanted not in present:
        raise _no_weights(folder, wanted, present, model)
    if wanted.endswith(".index.json"):
        return tuple(sorted(set(_weight_map(folder / wanted).values())))
    return (wanted,)


def verify_weights(folder: Path, names: Iterable[str]) -> int:
    """Check that every weight file is there, readable and as long as its header says.

    Args:
        folder: The checkpoint.
        names: From :func:`weight_names`.

    Returns:
        The weight files' size in bytes.

    Raises:
        ModelLoadError: names the file, what is wrong with it, and the remedy.
    """
    index = folder / INDEX
    tensors: dict[str, frozenset[str]] = {}
    for name in names:
        if index.exists() and not os.path.lexists(folder / name):
            raise ModelLoadError(f"{index} names {name}, which is missing. Download it into the same folder.")
        tensors[name] = verify_file(folder / name)
    if index.exists() and not {SINGLE, ADAPTER} & tensors.keys():
        for tensor, shard in _weight_map(index).items():
            if tensor not in tensors.get(shard, ()):
                raise ModelLoadError(f"{index} promises {tensor} in {shard}, which lacks it. Download both again.")
    return sum((folder / name).stat().st_size for name in tensors)


def verify_file(path: Path) -> frozenset[str]:
    """Compare a safetensors file's length with its header.

    Returns:
        The names of its tensors.

    Raises:
        ModelLoadError: cut short, too long, or not safetensors at all.
    """
    raw = read_header(path)
    size = path.stat().st_size
    spans = {name: tensor.span for name, tensor in stored_tensors(path, raw).items()}
    end = 0
    for (_, previous), (begin, _) in pairwise([(0, 0), *sorted(spans.values())]):
        if begin != previous:
            raise _broken(path, "its header has a gap or an overlap between tensors")
    end = max((stop for _, stop in spans.values()), default=0)
    expected = 8 + len(raw) + end
    if size != expected:
        what = "it is cut short" if size < expected else "it is too long"
        raise _broken(path, f"{what}: it has {size} bytes and its header promises {expected}")
    return frozenset(spans)


def read_header(path: Path) -> bytes:
    """A safetensors file's header, a JSON object.

    Raises:
        ModelLoadError: there is none.
    """
    check_readable(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        num_bytes = header_size(path, start)
        if 8 + num_bytes > size:
            raise _broken(path, f"it is cut short: it has {size} bytes and its header alone needs {8 + num_bytes}")
        return file.read(num_bytes)


def header_size(path: Path, start: bytes) -> int:
    """The length of the header behind a file's first 8 bytes.

    Raises:
        ModelLoadError: they are not those of a safetensors file.
    """
    if len(start) < 8:
        raise _broken(path, f"it has only {len(start)} bytes")
    num_bytes: int = struct.unpack("<Q", start[:8])[0]
    if num_bytes > _MAX_HEADER_BYTES:
        raise _broken(path, _foreign(start) or "its header is not one of a safetensors file")
    return num_bytes


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a safetensors header describes it: format such as ``BF16``, shape, place in the file."""

    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int]


def stored_tensors(path: Path, header: bytes) -> dict[str, StoredTensor]:
    """All tensors of a safetensors header by name.

    Raises:
        ModelLoadError: it is none.
    """
    try:
        entries: Any = json.loads(header)
        tensors: dict[str, StoredTensor] = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, stop = entry["data_offsets"]
                if not 0 <= begin <= stop:
                    raise ValueError(name)
                shape = tuple(int(size) for size in entry.get("shape", ()))
                tensors[name] = StoredTensor(str(entry.get("dtype", "")), shape, (int(begin), int(stop)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _broken(path, "its header is not one of a safetensors file") from None
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no weight_map; download it again.")
    entries = cast("dict[str, Any]", weight_map)
    for shard in entries.values():
        # A name from a download must not lead out of the folder.
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or shard == "..":
            raise ModelLoadError(f"{index} names {shard!r} as a shard, which is not a file of this folder.")
    return entries


def _foreign(start: bytes) -> str | None:
    if start.startswith(b"version "):
        return "it is a Git LFS pointer, not the weights; run: git lfs pull"
    if start[:4] == b"GGUF":
        return "it is a GGUF file under another name"
    if start[:4] == b"PK\x03\x04":
        return "it is a PyTorch pickle under another name"
    return None


def _broken(path: Path, why: str) -> ModelLoadError:
    remedy = "" if "git lfs" in why else f" Delete {path.resolve()} and download it again."
    return ModelLoadError(f"{path} cannot be used: {why}.{remedy}")


def gguf_refusal(where: str) -> ModelLoadError:
    """What to say of a GGUF file or repository."""
    return ModelLoadError(
        f"{where} holds GGUF files, which the transformers engine does not read. "
        "Take the safetensors checkpoint that they were made from."
    )


def _no_weights(folder: Path, wanted: str, names: set[str], model: str) -> ModelLoadError:
    top = sorted(name for name in names if "/" not in name)
    others = [name for name in top if name.endswith(".safetensors") and name != ADAPTER]
    pickles = [name for name in top if name.endswith(_PICKLES) and name not in _NOT_WEIGHTS]
    if any(name.endswith(".gguf") for name in top):
        return gguf_refusal(model)
    if wanted == ADAPTER and not pickles:
        return ModelLoadError(f"{model} has an adapter_config.json but no {ADAPTER}. Download it again.")
    if others and wanted != ADAPTER:
        remedy = "Rename it, or name it as transformers_weights in config.json."
        return ModelLoadError(f"{model} has {others[0]} but no {wanted}. {remedy}")
    if pickles:
        return ModelLoadError(
            f"{model} has only pickle weights ({pickles[0]}), which can run code when they are read. "
            f"Convert to safetensors: {_conversion(folder, pickles[0], wanted, model)}"
        )
    return ModelLoadError(f"{model} has no weights: {SINGLE} or {INDEX} is needed.")


def _conversion(folder: Path, pickle: str, wanted: str, model: str) -> str:
    if wanted != ADAPTER and pickle.startswith("pytorch_model"):
        code = (
            "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; a, b = sys.argv[1:]; "
            "M.from_pretrained(a).save_pretrained(b); T.from_pretrained(a).save_pretrained(b)"
        )
        return shlex.join(["python", "-c", code, model, model.rstrip("/") + "-safetensors"])
    if not (folder / pickle).exists():
        return "https://huggingface.co/spaces/safetensors/convert"
    code = (
        "import sys, torch; from safetensors.torch import save_file; a, b = sys.argv[1:]; "
        "w = {k: v.clone() for k, v in torch.load(a, weights_only=True).items()}; save_file(w, b, {'format': 'pt'})"
    )
    target = ADAPTER if wanted == ADAPTER else SINGLE
    return shlex.join(["python", "-c", code, str(folder / pickle), str(folder / target)])
