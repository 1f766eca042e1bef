"""From files to a model on its device, or a refusal with the reason."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch

from serve import checkpoint, weight_files
from serve.engine import lean
from serve.engine.base import EngineConfig, ModelFiles
from serve.engine.device import available_memory, choose_dtype, without_cuda
from serve.errors import ModelLoadError

logger = logging.getLogger(__name__)

GIB = 2**30
HEADROOM = 1.3
"""Beside the weights a device holds the KV cache and what a step computes."""


def import_transformers(files: ModelFiles | None = None) -> None:
    """The slow imports, apart from the weights, so that a cold start's log shows both and reading ahead covers them.

    ``files`` are the model's, if no other comes into this process: what it does not need stays away.
    """
    lean.defer_compiler()
    is_plain = files is not None and not files.adapter and not checkpoint.is_quantized(read_config(files.folder))
    with lean.without("accelerate") if is_plain else nullcontext():
        import transformers  # noqa: PLC0415
        from transformers.utils import logging as transformers_logging  # noqa: PLC0415

        lean.forgo_parallelism()
        # transformers imports a name when it is first touched.
        _ = transformers.AutoModelForCausalLM, transformers.PreTrainedModel, transformers.GenerationMixin
    importlib.import_module("transformers.masking_utils")  # the file of every model imports it
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; ``serve.weights`` has checked that it is JSON."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load_model(
    files: ModelFiles, dtype: torch.dtype, device: torch.device, config: EngineConfig, prepared: Any = None
) -> Any:
    """The model in evaluation mode on its device, its LoRA adapter merged.

    Args:
        files: The model's.
        dtype: Of its weights.
        device: Where it will run.
        config: The engine's.
        prepared: What :func:`load_detached` gave for the same files, if it was called.

    Raises:
        ModelLoadError: transformers refuses the files, or the device has too little memory.
    """
    raw = read_config(files.folder)
    checkpoint.check_architecture(raw, config.trust_remote_code)
    checkpoint.check_quantization(raw, device.type)
    try:
        own = checkpoint.stored_dtype(raw)
        if prepared is None and device.type != "cpu" and own and not checkpoint.is_quantized(raw):
            # Views of the mapped files: the device reads them and changes their format, and main memory holds no copy.
            prepared = _read_model(files, getattr(torch, own), config)
        model = _cast(prepared, dtype, device) if prepared is not None else None
        if model is None:
            prepared = None
            model = _read_model(files, dtype, config)
        return model.to(device).eval()
    except ModelLoadError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(_too_large(files, raw, dtype, device)) from error
    except Exception as error:
        raise ModelLoadError(f"transformers cannot load {files.folder.name}: {_first_line(error)}") from error


def load_detached(files: ModelFiles, config: EngineConfig) -> Any:
    """The model in main memory, for a memory snapshot: no file stays mapped, and no GPU is asked for.

    Its weights keep the checkpoint's number format where the device, which is not known yet, decides about it.
    None for a quantised checkpoint: how that is read depends on the device.

    Raises:
        ModelLoadError: transformers refuses the files.
    """
    raw = read_config(files.folder)
    checkpoint.check_architecture(raw, config.trust_remote_code)
    if checkpoint.is_quantized(raw):
        return None
    own = checkpoint.stored_dtype(raw)
    if config.dtype != "auto" or config.device == "cpu" or own is None:
        dtype = choose_dtype(config.dtype, torch.device("cpu"), own).value
    else:
        dtype = getattr(torch, own)
    try:
        with without_cuda():
            model = _read_model(files, dtype, config)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # transformers' own is a view of the mapped file
        return model.eval()
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"transformers cannot load {files.folder.name}: {_first_line(error)}") from error


def _read_model(files: ModelFiles, dtype: torch.dtype, config: EngineConfig) -> Any:
    import transformers  # noqa: PLC0415

    auto: Any = transformers.AutoModelForCausalLM
    model, said = auto.from_pretrained(
        files.folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    if missing := missing_weights(model, said):
        raise ModelLoadError(
            f"{files.folder.name} lacks weights that the model has: {missing}. Random numbers would be in their place. "
            "Download it again, or take a complete checkpoint."
        )
    if files.adapter is not None:
        from serve.adapters import merge_adapter  # noqa: PLC0415

        model = cast("Any", merge_adapter(model, files.adapter))
    return model


def missing_weights(model: Any, said: dict[str, Any]) -> str:
    """Parameters that no file had, in words; empty: all were there.

    Args:
        model: As ``from_pretrained`` gave it.
        said: Its loading info; names that are tied to others, or never stored, are not in it.
    """
    if getattr(model, "hf_quantizer", None) is not None:  # stored under names of the method's own
        return ""
    names = sorted({name for name, _ in model.named_parameters()} & set(said["missing_keys"]))
    return "" if not names else names[0] + (f" and {len(names) - 1} others" if names[1:] else "")


def _too_large(files: ModelFiles, raw: dict[str, Any], dtype: torch.dtype, device: torch.device) -> str:
    """What the weights need, what is there, and what would do."""
    names = [path.name for path in files.folder.iterdir()]
    needed = sum(
        (files.folder / name).stat().st_size
        for name in weight_files.weight_names(files.folder, raw, names, files.folder.name)
    )
    own = checkpoint.stored_dtype(raw)
    if own and not checkpoint.is_quantized(raw):
        needed = needed * dtype.itemsize // getattr(torch, own).itemsize
    free, enough = available_memory(device), needed * HEADROOM
    return (
        f"the weights do not fit on {device}: they take {needed / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}, "
        f"and {free / GIB:.1f} GiB are free now; take a device with {enough / GIB:.1f} GiB or more, or a smaller or "
        "quantised model"
    )


def _cast(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """``model`` in ``dtype``, as if it had been read so; None when only reading it again gives that.

    What changes its format does so on ``device``, tensor by tensor.

    What is not in the checkpoint, such as RoPE's frequencies, keeps its format.
    """
    own: torch.dtype = model.dtype
    if own == dtype:
        return model
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        logger.info("The weights are read again: some layers of %s have a format of their own", type(model).__name__)
        return None
    saved = set(model.state_dict())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved and tensor.dtype == own:
            tensor.data = tensor.data.to(device).to(dtype)
    model.config.dtype = dtype
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
