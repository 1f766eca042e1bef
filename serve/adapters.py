"""Merge a LoRA adapter into its base model, in memory, before the engine takes the model over.

``peft`` is imported when called: it is an extra, ``trimaran[lora]``.
"""

from __future__ import annotations

import logging
import shlex
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from serve.errors import ModelLoadError
from serve.weight_files import ADAPTER, read_json, verify_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_MERGE = (
    "import sys; from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
    "a, b, t = sys.argv[1:]; M.from_pretrained(a).merge_and_unload().save_pretrained(b); "
    "T.from_pretrained(t).save_pretrained(b)"
)


def merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Add the adapter's weights to ``model``'s own; the result is as fast as the base.

    Args:
        model: The loaded base model; it must not be used afterwards.
        adapter: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ModelLoadError: peft is missing, the adapter's files are broken, or it is not an adapter of this base.
    """
    try:
        import peft  # noqa: PLC0415
    except ImportError:
        raise ModelLoadError(_without_peft(adapter)) from None
    # peft falls back to a pickle, or to the Hub, when this file is missing.
    verify_file(adapter / ADAPTER)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # peft still asks transformers under a name that is on its way out: nothing that a user could act on.
            warnings.simplefilter("ignore", FutureWarning)
            merged = _merge(cast("Any", peft), model, str(adapter))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(
            f"The adapter {adapter} does not fit the base model ({reason}). "
            "Check base_model_name_or_path in its adapter_config.json."
        ) from error
    logger.info("Merged the adapter %s in %.2f s.", adapter, time.perf_counter() - started)
    return cast("PreTrainedModel", merged.eval())


def _merge(peft: Any, model: PreTrainedModel, adapter: str) -> Any:
    config = peft.PeftConfig.from_pretrained(adapter)
    config.inference_mode = True
    adapted = peft.PeftModelForCausalLM(model, config)
    result = adapted.load_adapter(adapter, "default")
    # Not peft's from_pretrained: that only warns of modules without adapter weights, and drops surplus weights.
    if result.missing_keys:
        raise ValueError(f"it has no weights for {result.missing_keys[0]}")
    if result.unexpected_keys:
        raise ValueError(f"the base has no module for {result.unexpected_keys[0]}")
    return adapted.merge_and_unload(safe_merge=True)


def _without_peft(adapter: Path) -> str:
    base = str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path"))
    has_tokenizer = (adapter / "tokenizer_config.json").exists()
    tokenizer = str(adapter) if has_tokenizer else base
    merged = f"{adapter}-merged"
    command = shlex.join(["python", "-c", _MERGE, str(adapter), merged, tokenizer])
    return (
        f"{adapter} is a LoRA adapter, which needs peft. Run: pip install 'trimaran[lora]', "
        f"or merge it once where peft is and serve {merged}: {command}"
    )
