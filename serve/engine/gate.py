"""Whether a model may run in batches behind :mod:`serve.engine.attention`: a survey of its layers, then a comparison.

The survey is made at every start.  The comparison runs two requests in one batch and checks their logits against the
model's own forward pass; its verdict can be kept.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve import kernels
from serve.engine import attention, compiled, flash, packed, tiles
from serve.engine.base import ModelFiles
from serve.engine.kv_cache import KVCache
from serve.engine.scheduler import Scheduler
from serve.engine.survey import NotBatchable, attention_of, explained, probe_tokens, survey
from serve.engine.verdicts import Verdict, VerdictFile
from serve.errors import ModelLoadError
from serve.types import GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)

NUM_DECODES = 2
CHUNK_TOKENS = 5
SHORT_WINDOW = 64
"""Windows up to this length are crossed by the comparison, too; longer ones are checked on their mask alone."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""How far :func:`off_by` may go."""

UNREACHABLE = -6e4


def verdict_file(files: ModelFiles, dtype: torch.dtype, device: torch.device, cache_dir: Path | None) -> VerdictFile:
    """Where the verdict on these files is kept: by versions, number format and kind of device.

    In bfloat16 on a CPU also by the compiled kernels: an image may be built on a machine that cannot use them.
    """
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if place == "cpu" and dtype is torch.bfloat16 and compiled.library() is not None:
        place = kernels.library().name
    folders = [files.folder] if files.adapter is None else [files.folder, files.adapter]
    return VerdictFile(cache_dir, folders, [torch.__version__, version("transformers"), str(dtype), place])


def examine(model: Any, kept: VerdictFile) -> KVCache:
    """Survey the model, compare it unless that was done before, and switch it to the engine's attention.

    Returns:
        A small cache that knows the shapes and patterns of all layers.

    Raises:
        NotBatchable: it would be wrong in a batch; its own attention is in place again.
    """
    seen = survey(model)
    verdict = kept.read()
    if verdict is None or verdict.reason is None:
        seen.varlen = flash.choose(seen, model.dtype, model.device)
        seen.kernels = tiles.choose(seen, model.dtype, model.device)
    source = "compared before" if verdict else "compared now"
    if verdict is None:
        try:
            verdict = Verdict(None, compare(model, seen))
        except NotBatchable as error:
            verdict = Verdict(str(error), None)
        kept.write(verdict)
    if verdict.reason is not None:
        raise NotBatchable(verdict.reason)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    logger.info("Batching: logits differ from those alone by %.2g of their spread (%s)", verdict.off_by, source)
    return seen


def compare(model: Any, seen: KVCache) -> float:
    """Two requests of different lengths, prefilled in chunks and decoded together, against the model alone.

    Returns:
        The difference, as :func:`off_by` measures it.

    Raises:
        NotBatchable: it is too large, or the model does not run.
    """
    vocab_size = model.config.get_text_config().vocab_size
    windows = [pattern.size for pattern in seen.patterns if 0 < pattern.size <= SHORT_WINDOW]
    lengths = (CHUNK_TOKENS + 2, 2 * CHUNK_TOKENS + 1 + max(windows, default=0))
    rows = [probe_tokens(vocab_size, length + NUM_DECODES, 11 * length) for length in lengths]
    expected = [alone(model, row)[length - 1 :] for row, length in zip(rows, lengths, strict=True)]
    attention.register()
    cache = seen.resized(len(rows), max(map(len, rows)) + 1)
    with attention_of(model, attention.NAME), explained():
        got = _batched(model, cache, rows, lengths)
    worst = max(off_by(a[: len(b)], b) for a, b in zip(expected, got, strict=True))
    if not worst <= TOLERANCE[model.dtype]:
        raise NotBatchable(f"its logits in a batch differ from those alone by {worst:.2g} of their spread")
    return worst


def off_by(expected: Tensor, got: Tensor) -> float:
    """The root mean square of a row's differences, in spreads of its expected logits; that of the worst row.

    A lost state or a wrong position gives about 1.  The largest difference says less: rounding in a large vocabulary,
    or a token that rounding sends to another expert, can move a single logit far.
    """
    worst = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        # Some models write a huge negative number where no token may come.
        kept = theirs > UNREACHABLE
        off = float((ours - theirs)[kept].square().mean().sqrt() / theirs[kept].std())
        if not off <= worst:  # NaN too
            worst = off
    return worst


def alone(model: Any, tokens: list[int]) -> Tensor:
    """Logits ``[len(tokens), vocab_size]`` of the model's own forward pass, without a cache.

    Raises:
        ModelLoadError: they are not finite.
    """
    logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()
    if not bool(logits.amax(-1).isfinite().all()):
        raise not_finite(model.dtype)
    return logits


def not_finite(dtype: torch.dtype) -> ModelLoadError:
    """The error for a model that computes no numbers."""
    return ModelLoadError(f"the model's logits are not finite in {dtype}; try SERVE_DTYPE=bfloat16 or float32")


def _batched(model: Any, cache: KVCache, rows: list[list[int]], lengths: tuple[int, ...]) -> list[Tensor]:
    scheduler = Scheduler(num_slots=len(rows), prefill_chunk_tokens=CHUNK_TOKENS, eos_token_ids=frozenset())
    params = SamplingParams(max_tokens=NUM_DECODES + 1, temperature=0.0)
    of: dict[str, tuple[list[int], list[Tensor]]] = {}
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        request_id = f"probe-{number}"
        of[request_id] = row, []
        scheduler.add(GenerationRequest(request_id=request_id, prompt_token_ids=tuple(row[:length]), params=params))
    while scheduler.has_work:
        batch = scheduler.schedule()
        logits = packed.forward(model, batch, cache)
        taken: list[int] = []
        for sequence, row_logits in zip(batch.sampled, logits, strict=False):
            row, got = of[sequence.request.request_id]
            got.append(row_logits.float())
            # Not the model's own choice: the comparison goes along a text that was fixed before.
            taken.append(row[min(len(sequence.prompt_token_ids) + len(got) - 1, len(row) - 1)])
        scheduler.complete(batch, taken)
        scheduler.release()
    return [torch.stack(got) for _, got in of.values()]
