"""From files to a model that is proven to run behind :mod:`serve.engine.attention`, or a refusal with the reason."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any, cast

import torch

from serve import checkpoint
from serve.engine import attention
from serve.engine.base import EngineConfig, ModelFiles
from serve.engine.device import choose_dtype, without_cuda
from serve.engine.kv_cache import KVCache
from serve.engine.scheduler import Batch, Scheduler
from serve.errors import ModelLoadError
from serve.types import GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)

PROBE_PROMPT = (3, 5, 7, 11, 13)
PROBE_STEPS = 2
# Relative to the spread of the logits.  A wrong layout or a lost state is off by about the spread itself.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


def import_transformers() -> None:
    """The slow imports, apart from the weights, so that a cold start's log shows both."""
    import transformers  # noqa: PLC0415
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    _ = transformers.AutoModelForCausalLM  # transformers imports a name when it is first touched
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; ``serve.weights`` has checked that it is JSON."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def checkpoint_dtype(config: dict[str, Any]) -> str | None:
    """The number format that config.json names."""
    text_config: dict[str, Any] = config.get("text_config") or {}
    return config.get("dtype") or config.get("torch_dtype") or text_config.get("dtype")


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
        model = _cast(prepared, dtype) if prepared is not None else None
        if model is None:
            model = _read_model(files, dtype, config)
        return model.to(device).eval()
    except ModelLoadError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"the weights do not fit on {device}: {_first_line(error)}") from error
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
    own = checkpoint_dtype(raw)
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
    model = auto.from_pretrained(
        files.folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
    )
    if files.adapter is not None:
        from serve.adapters import merge_adapter  # noqa: PLC0415

        model = cast("Any", merge_adapter(model, files.adapter))
    return model


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """``model`` in ``dtype``, as if it had been read so; None when only reading it again gives that.

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
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model


def probe(model: Any, max_model_len: int) -> KVCache:
    """Compare a short prompt and two decoded tokens with transformers' own attention; switch the model to ours.

    Returns:
        The probe's small cache, which knows the shapes of all layers.

    Raises:
        ModelLoadError: the model keeps state that our slots do not hold, or its attention is not called.
    """
    config = model.config.get_text_config()
    _refuse_by_config(model, config, max_model_len)
    device, dtype = model.device, model.dtype
    tokens = [token_id % config.vocab_size for token_id in PROBE_PROMPT]
    native = list(tokens)
    expected: list[torch.Tensor] = []
    for _ in range(PROBE_STEPS):
        expected.append(model(input_ids=torch.tensor([native], device=device), use_cache=False).logits[0, -1].float())
        native.append(int(expected[-1].argmax()))
    attention.register()
    model.set_attn_implementation(attention.NAME)
    cache = KVCache(2, len(native) + 1, dtype, device)
    scheduler = Scheduler(num_slots=2, prefill_chunk_tokens=3, eos_token_ids=frozenset())
    params = SamplingParams(max_tokens=PROBE_STEPS, temperature=0.0)
    scheduler.add(GenerationRequest(request_id="probe", prompt_token_ids=tuple(tokens), params=params))
    got: list[torch.Tensor] = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        logits = _probe_forward(model, batch, cache)
        if batch.sampled:
            got.append(logits.float())
        scheduler.complete(batch, [native[len(tokens) + len(got) - 1]] if batch.sampled else [])
        scheduler.release()
    _compare(expected, got, dtype, cache.num_layers, config.num_hidden_layers, type(model).__name__)
    return cache


def _probe_forward(model: Any, batch: Batch, cache: KVCache) -> torch.Tensor:
    if batch.decodes:
        token_ids, first = batch.decodes[0].output_token_ids[-1:], batch.decodes[0].num_computed_tokens
    else:
        chunk = batch.chunks[0]
        first = chunk.start
        token_ids = list(chunk.sequence.prompt_token_ids[first : first + chunk.num_tokens])
    positions = torch.arange(first, first + len(token_ids), device=model.device)[None]
    try:
        return model(
            input_ids=torch.tensor([token_ids], device=model.device),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=torch.tensor([len(token_ids) - 1], device=model.device),
            step=attention.make_context(batch, cache, model.dtype, model.device),
        ).logits[0, -1]
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{type(model).__name__} does not run in the engine: {_first_line(error)}") from error


def _compare(
    expected: list[torch.Tensor], got: list[torch.Tensor], dtype: torch.dtype, seen: int, layers: int, name: str
) -> None:
    if seen != layers:
        raise ModelLoadError(
            f"{name} has {layers} layers, but attention was called in {seen}: it cannot be batched here"
        )
    worst = max(float((a - b).abs().max() / a.std()) for a, b in zip(expected, got, strict=True))
    if not worst <= PROBE_TOLERANCE[dtype]:
        raise ModelLoadError(
            f"{name} gives other logits in the engine than alone (off by {worst:.2g} of their spread): "
            "it keeps state between tokens that the engine does not hold"
        )
    logger.info("Probe: logits agree with transformers' own attention (off by %.2g of their spread)", worst)


def _refuse_by_config(model: Any, config: Any, max_model_len: int) -> None:
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise ModelLoadError(f"{name} is recurrent; only attention-based models can be served")
    odd = sorted({kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"})
    if odd:
        raise ModelLoadError(f"{name} has layers of type {', '.join(odd)}; only full attention is served yet")
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings") or max_model_len
    # These read the longest position of the whole row, so one request would change its neighbours' results.
    if kind in {"dynamic", "longrope"} and max_model_len > original:
        raise ModelLoadError(f"{name} uses {kind} RoPE; set SERVE_MAX_MODEL_LEN={original} to serve it exactly")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
