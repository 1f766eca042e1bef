"""How many slots of how many tokens fit in the memory that is free.  Plain arithmetic: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from serve.errors import ModelLoadError

MIN_SLOTS = 8
"""Without settings, the context shrinks rather than the batch below this."""

MIN_CONTEXT_TOKENS = 256
MIB = 2**20


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The KV cache: slots, tokens in each, and the arithmetic in words."""

    num_slots: int
    max_model_len: int
    reason: str


def fit_cache(
    *,
    bytes_per_token: int,
    budget: int,
    model_len: int,
    default_slots: int,
    max_batch_size: int | None = None,
    max_model_len: int | None = None,
) -> CacheSize:
    """Choose slots and context within ``budget`` bytes; what the settings name is kept or refused, never changed.

    Raises:
        ModelLoadError: it does not fit; says how much is needed and what would fit.
    """
    tokens = max(0, budget // bytes_per_token)
    context = max_model_len or model_len
    slots = max_batch_size or min(default_slots, max(tokens // context, MIN_SLOTS))
    if max_model_len is None and slots * context > tokens:
        context = min(context, max(tokens // slots, MIN_CONTEXT_TOKENS))
    if max_batch_size is None and slots * context > tokens:
        slots = max(1, tokens // context)
    needed = slots * context * bytes_per_token
    reason = (
        f"{slots} slots x {context} tokens x {bytes_per_token} bytes = {needed / MIB:.0f} MiB "
        f"of {budget / MIB:.0f} MiB for the KV cache"
    )
    if needed > budget:
        raise ModelLoadError(
            f"the KV cache does not fit: {reason}; at most {tokens} tokens in all fit: "
            "lower SERVE_MAX_MODEL_LEN or SERVE_MAX_BATCH_SIZE, or take more memory"
        )
    return CacheSize(slots, context, reason)
