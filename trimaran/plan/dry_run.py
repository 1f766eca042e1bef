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
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            model = _build(folder, getattr(torch, dtype))
            return _measure(model, context)
    except ModelLoadError as error:
        return error.message
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"it does not run without weights: {first_line}"


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
