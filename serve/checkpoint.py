"""What a checkpoint's configuration says, and whether it can be served here.

Only :func:`check_architecture` imports transformers, when called; the rest is standard library.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from serve.errors import ModelLoadError
from serve.weight_files import read_json

logger = logging.getLogger(__name__)

# What different architectures call the longest context that they were made for, in tokens.  transformers stores
# lengths that a rope scaling has extended already.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")


def eos_token_ids(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end a sequence: those of ``generation_config.json``, else of ``config.json``.

    Empty when neither names one.  The tokenizer's own is the caller's to add.

    Raises:
        ModelLoadError: ``generation_config.json`` is not JSON.
    """
    for source in (_generation_config(folder), config, _text_config(config)):
        if found := _ids(source.get("eos_token_id")):
            return found
    return frozenset()


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens of prompt and completion together that the model was made for; ``None`` when it sets no limit."""
    for source in (config, _text_config(config)):
        for key in _LENGTH_KEYS:
            value = source.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def longest_context(config: Mapping[str, Any]) -> int | None:
    """Tokens that can be asked for: :func:`context_length`, or with dynamic RoPE as many times that as its factor says.

    transformers stretches such frequencies with the longest position that it sees; the engine fixes them at load.
    """
    own = context_length(config)
    for source in (_text_config(config), config):
        for key in ("rope_parameters", "rope_scaling"):
            rope: Any = source.get(key)
            if own and isinstance(rope, dict) and (rope := cast("dict[str, Any]", rope)):
                kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
                if kind == "dynamic" and isinstance(factor, int | float) and 1 < factor < math.inf:
                    return int(own * factor)
    return own


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Width of the model's logits; ``None`` when the files do not say."""
    for source in (_text_config(config), config):
        value = source.get("vocab_size")
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The number format that the files name, such as ``bfloat16``; None when they name none."""
    return config.get("dtype") or config.get("torch_dtype") or _text_config(config).get("dtype")


def default_sampling(folder: Path) -> dict[str, float]:
    """What the model's authors recommend when a request leaves it out: temperature, top_p, top_k, min_p.

    Empty when ``generation_config.json`` neither sets a temperature nor asks for sampling.  Values out of range
    are left out, with a warning.

    Raises:
        ModelLoadError: ``generation_config.json`` is not JSON.
    """
    recommended = _generation_config(folder)
    if recommended.get("temperature") is None and not recommended.get("do_sample"):
        return {}
    sampling: dict[str, float] = {}
    for name, is_valid in _SAMPLING.items():
        value = recommended.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_valid(value):
            logger.warning("generation_config.json: %s=%r is out of range and left out.", name, value)
            continue
        sampling[name] = int(value) if name == "top_k" else value
    return sampling


_SAMPLING: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value < math.inf,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: 0 <= value < math.inf and value == int(value),
    "min_p": lambda value: 0 <= value <= 1,
}


def check_architecture(config: Mapping[str, Any], trust_remote_code: bool = False) -> None:
    """Refuse a model that transformers cannot build as a causal language model.  Imports transformers.

    Raises:
        ModelLoadError: says whether it needs remote code, another transformers, or is no language model.
    """
    import transformers  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: PLC0415

    model_type = config.get("model_type")
    auto_map = config.get("auto_map")
    has_code = isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
    if model_type not in transformers.CONFIG_MAPPING and auto_map:
        if not trust_remote_code:
            raise ModelLoadError(
                f"model_type {model_type!r} needs Python code that comes with the model. "
                "Read that code, then set SERVE_TRUST_REMOTE_CODE=true."
            )
        if has_code:
            return
    if trust_remote_code and has_code:
        return
    if not model_type:
        raise ModelLoadError("config.json has no model_type: it is not of a model that transformers can load.")
    if model_type not in transformers.CONFIG_MAPPING:
        raise ModelLoadError(
            f"transformers {transformers.__version__} does not know model_type {model_type!r}. "
            "A newer one may: pip install --upgrade transformers"
        )
    known = {model_type, _text_config(config).get("model_type")}
    if known.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        names = ", ".join(config.get("architectures") or [str(model_type)])
        raise ModelLoadError(f"{names} is not a causal language model. Choose a model for text generation.")


@dataclass(frozen=True, slots=True)
class _Method:
    """What transformers needs for one quantisation: module and pip names, on which devices."""

    packages: tuple[tuple[str, str], ...]
    needs_gpu: bool = False
    gpu_packages: tuple[tuple[str, str], ...] = ()


_ACCELERATE = ("accelerate", "accelerate")
_KERNELS = ("kernels", "kernels")
_GPTQMODEL = ("gptqmodel", "gptqmodel")
# As the quantizers of transformers 5.24 require it.  fp8, mxfp8 and mxfp4 are dequantised where there is no GPU.
_METHODS: dict[str, _Method] = {
    "gptq": _Method((_GPTQMODEL, ("optimum", "optimum"))),
    "awq": _Method((_GPTQMODEL, _ACCELERATE)),
    "bitsandbytes": _Method((("bitsandbytes", "bitsandbytes"), _ACCELERATE)),
    "fp8": _Method((_ACCELERATE,), gpu_packages=(_KERNELS,)),
    "mxfp8": _Method((_ACCELERATE,), gpu_packages=(_KERNELS,)),
    "mxfp4": _Method((_ACCELERATE,)),
    "compressed-tensors": _Method((("compressed_tensors", "compressed-tensors"),)),
    "torchao": _Method((("torchao", "torchao"),)),
    "hqq": _Method((("hqq", "hqq"),)),
    "quanto": _Method((("optimum.quanto", "optimum-quanto"), _ACCELERATE)),
    "auto-round": _Method((("auto_round", "auto-round"),)),
    "quark": _Method((("quark", "amd-quark"),)),
    "bitnet": _Method((_ACCELERATE,)),
    "aqlm": _Method((("aqlm", "aqlm[gpu,cpu]"), _ACCELERATE)),
    "eetq": _Method((_KERNELS, _ACCELERATE), needs_gpu=True),
    "fbgemm_fp8": _Method((("fbgemm_gpu", "fbgemm-gpu"), _ACCELERATE), needs_gpu=True),
    "vptq": _Method((("vptq", "vptq"), _ACCELERATE), needs_gpu=True),
    "spqr": _Method((("spqr_quant", "spqr_quant[gpu]"), _ACCELERATE), needs_gpu=True),
}


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether the weights are stored in fewer bits, which only some devices can use."""
    return isinstance(_quantization(config), dict)


def quantization_method(config: Mapping[str, Any]) -> str:
    """The method by transformers' name, such as ``fp8``; empty: the checkpoint is not quantised."""
    quantization = _quantization(config)
    if not isinstance(quantization, dict):
        return ""
    settings = cast("dict[str, Any]", quantization)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method") or "").lower() or "an unnamed method"


def quantization_packages(config: Mapping[str, Any], device_type: str) -> tuple[tuple[str, str], ...]:
    """Modules that a quantised checkpoint needs on ``device_type`` (cuda, cpu), each with pip's name for it.

    Raises:
        ModelLoadError: the method is not known, or cannot run there; with the alternative.
    """
    name = quantization_method(config)
    if not name:
        return ()
    method = _METHODS.get(name)
    if method is None:
        raise ModelLoadError(
            f"The checkpoint is quantised with {name}, which is not supported here. "
            "Take the checkpoint that it was quantised from, or one in gptq, awq or fp8."
        )
    if method.needs_gpu and device_type != "cuda":
        raise ModelLoadError(
            f"The checkpoint is quantised with {name}, which needs a GPU. "
            "Serve it on one, or take the checkpoint that it was quantised from."
        )
    return method.packages + (method.gpu_packages if device_type == "cuda" else ())


def check_quantization(config: Mapping[str, Any], device_type: str) -> None:
    """Refuse a quantised checkpoint whose package is missing or that ``device_type`` (cuda, cpu) cannot run.

    Raises:
        ModelLoadError: names the method, what it needs, and the alternative.
    """
    missing = [pip for module, pip in quantization_packages(config, device_type) if not _is_installed(module)]
    if missing:
        packages = " ".join(f"'{pip}'" if "[" in pip else pip for pip in missing)
        raise ModelLoadError(
            f"The checkpoint is quantised with {quantization_method(config)}, which needs {' and '.join(missing)}. "
            f"Run: pip install {packages}, or take the checkpoint that it was quantised from."
        )


def _quantization(config: Mapping[str, Any]) -> Any:
    return config.get("quantization_config") or _text_config(config).get("quantization_config")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # The parent of a dotted name is missing.
        return False


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return cast("dict[str, Any]", nested) if isinstance(nested, dict) else {}


def _ids(value: Any) -> frozenset[int]:
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    return frozenset(item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
