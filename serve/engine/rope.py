"""Rotary frequencies that follow the longest position of a pass, fixed for the context that is served.

transformers recomputes dynamic and long RoPE from the longest position that it sees.  In a batch that position may
belong to somebody else, and a growing sequence would be rotated by other frequencies than its cached keys were.
"""

from __future__ import annotations

from typing import Any, cast


def fix_frequencies(model: Any, max_model_len: int) -> list[str]:
    """Compute the frequencies for ``max_model_len`` tokens, once and for all; return the kinds that were fixed."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    fixed: list[str] = []
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        per_layer_type = cast("dict[str, str]", kinds) if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in list(per_layer_type.items()):
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            prefix = f"{layer_type}_" if layer_type else ""
            before = getattr(module, f"{prefix}inv_freq")
            options = {"layer_type": layer_type} if layer_type else {}
            compute: Any = ROPE_INIT_FUNCTIONS[kind]
            frequencies, scaling = compute(module.config, before.device, seq_len=max_model_len, **options)
            setattr(module, f"{prefix}inv_freq", frequencies.to(before.dtype))
            setattr(module, f"{prefix}attention_scaling", scaling)
            # transformers recomputes by this name alone.
            if layer_type:
                kinds[layer_type] = "default"
            else:
                module.rope_type = "default"
            fixed.append(kind)
    return fixed
