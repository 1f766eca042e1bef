"""A model built without weights (on torch's meta device) and run once: what it takes, exactly, for any architecture.

Nothing is downloaded, no memory is taken, and Python code that comes with the model is never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import ModelLoadError

WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
SHORT_TOKENS = 64
CANNOT_BUILD = "it cannot be built from its config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a model takes in memory, in bytes, in the number format that it was built with.

    ``kv_bytes_per_token`` is what a token takes in the engine's cache; 0 where the engine runs one request at a time
    with the model's own cache.  ``own_cache_bytes`` is that cache of one sequence as long as the context; sliding
    windows and recurrent layers take less in it.
    """

    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    own_cache_bytes: int
    reason: str
    """Why it cannot run in batches; empty: it can."""


def dry_run(folder: Path, dtype: str, context: int) -> DryRun | str:
    """Build and run the model whose configuration is in ``folder``.

    Args:
        folder: With ``config.json``; no weights are read.
        dtype: Of weights and cache, such as ``bfloat16``.
        context: Tokens of a sequence.

    Returns:
        What it takes, or why it cannot be built here: it needs code of its own, or torch is not installed.
    """
    try:
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415
    except ImportError as error:
        return f"{error.name} is not installed (pip install 'trimaran[engine]')"
    from serve.weight_files import read_json  # noqa: PLC0415

    if why := _unknown(read_json(folder / "config.json"), transformers.CONFIG_MAPPING):
        return why
    stage = CANNOT_BUILD
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            model = _build(folder, getattr(torch, dtype))
            stage = "it does not run without weights"
            return _measure(model, context)
    except ModelLoadError as error:
        return error.message
    except Exception as error:
        return f"{stage}: {_in_short(error)}"


def misfit(folder: Path, stored: Mapping[str, tuple[int, ...]]) -> str:
    """What transformers would say of a configuration that does not go with the weights beside it.

    Args:
        folder: With ``config.json``; where the weights are there too, they are asked for all of their names.
        stored: The shapes of the tensors in the files.  Names that the model does not have are passed over: some
            architectures are stored under others.

    Returns:
        Why it cannot be built, or which tensor has another shape or is missing; empty: nothing is wrong that can be
        seen from here.
    """
    try:
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415
    except ImportError:
        return ""
    from serve.weight_files import read_json  # noqa: PLC0415

    if _unknown(read_json(folder / "config.json"), transformers.CONFIG_MAPPING):
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _build(folder, torch.bfloat16)
    except Exception as error:
        return f"{CANNOT_BUILD}: {_in_short(error)}"
    for name, tensor in model.state_dict().items():
        if name in stored and stored[name] != tuple(tensor.shape):
            return f"{name} is stored as {stored[name]}, and config.json makes it {tuple(tensor.shape)}"
    missing = _missing(folder) if stored and any(folder.glob("*.safetensors")) else ""
    return f"weights are missing: {missing}" if missing else ""


def _missing(folder: Path) -> str:
    """Parameters that no file beside the configuration has, found without reading values."""
    from importlib.util import find_spec  # noqa: PLC0415

    import transformers  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    from serve.engine.loader import missing_weights  # noqa: PLC0415

    if find_spec("accelerate") is None:  # transformers places nothing without it
        return ""
    auto: Any = transformers.AutoModelForCausalLM
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, said = auto.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, device_map="meta", output_loading_info=True
        )
        return missing_weights(model, said)
    except Exception:  # not of this check: loading itself says why
        return ""
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _unknown(config: Mapping[str, Any], known: Any) -> str | None:
    if config.get("model_type") in known:
        return None
    if config.get("auto_map"):
        return "its Python code is not run for a plan"
    return f"this transformers does not know model_type {config.get('model_type')!r}"


def _build(folder: Path, dtype: Any) -> Any:
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    auto: Any = transformers.AutoModelForCausalLM
    configs: Any = transformers.AutoConfig
    config = configs.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.dtype = dtype
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    # Of the implementations of experts this one needs no values, and takes any number format.
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    model.config.pad_token_id = None  # or the model looks for it among tokens that have no values
    return model


def _measure(model: Any, context: int) -> DryRun:
    from serve.engine.survey import NotBatchable, survey  # noqa: PLC0415

    tensors = [*model.parameters(), *model.buffers()]
    per_token, reason = 0, ""
    try:
        per_token = survey(model).bytes_per_token
    except NotBatchable as error:
        reason = str(error)
    return DryRun(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        kv_bytes_per_token=per_token,
        own_cache_bytes=_cache_bytes(model, context, is_slow=bool(reason)),
        reason=reason,
    )


def _cache_bytes(model: Any, context: int, is_slow: bool) -> int:
    """Bytes of the model's own cache after ``context`` tokens.

    Recurrent layers take their tokens one by one.  Where no window ends, two short runs say how the cache grows.
    """
    config = model.config.get_text_config()
    windows = [size for name in WINDOWS if isinstance(size := getattr(config, name, None), int) and size < context]
    if not is_slow or context <= 2 * SHORT_TOKENS or windows:
        return _run(model, context)
    short, long = _run(model, SHORT_TOKENS), _run(model, 2 * SHORT_TOKENS)
    return long + (long - short) // SHORT_TOKENS * (context - 2 * SHORT_TOKENS)


def _run(model: Any, num_tokens: int) -> int:
    from serve.engine.alone import CACHE_NAMES, num_bytes_below  # noqa: PLC0415

    out = model(**_tokens(model, num_tokens))
    return num_bytes_below(next((found for name in CACHE_NAMES if (found := out.get(name)) is not None), None))


def _tokens(model: Any, context: int) -> dict[str, Any]:
    import inspect  # noqa: PLC0415

    import torch  # noqa: PLC0415

    ids = torch.zeros(1, context, dtype=torch.long, device="meta")
    keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, "use_cache": True, **({"logits_to_keep": 1} if keeps_rows else {})}
