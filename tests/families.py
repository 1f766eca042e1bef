"""Tiny random models of many architectures, and how each of them must be served.

``docs/reference/models.md`` shows this table; ``tests/engine/test_families.py`` checks both against the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
WINDOW = 8
"""Shorter than most of the prompts, and no multiple of the chunks that they are prefilled in."""

SLIDING = {"sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = {**MIXED, "query_pre_attn_scalar": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}


class Served(StrEnum):
    """How a family is served."""

    BATCHED = "batched"
    ALONE = "one at a time"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Family:
    """A family by its transformers name, as ``Llama`` in ``LlamaForCausalLM``."""

    name: str
    served: Served = Served.BATCHED
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    without: tuple[str, ...] = ()
    """Names of ``BASE`` that its configuration does not know, or derives."""
    note: str = ""
    """What is special about it; of one that is not batched, the reason that the engine gives."""
    config_class: str = ""
    model_class: str = ""

    @property
    def id(self) -> str:
        """What tests and the documentation call it."""
        return f"{self.name} ({self.note})" if self.note and self.served is Served.BATCHED else self.name


GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
NOT_GPT = tuple(set(BASE) - {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"})
ALL_HEADS = ("num_key_value_heads", "head_dim")
LLAMA4 = {
    "attention_chunk_size": WINDOW,
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    "num_local_experts": 2,
    "intermediate_size_mlp": 96,
}
QWEN3_NEXT = {
    **EXPERTS,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MINIMAX = {"num_local_experts": 4, "layer_types": ["full_attention", "linear_attention", "full_attention"]}
JAMBA = {
    "num_experts": 2,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
MAMBA2 = {"num_heads": 8, "expand": 2, "n_groups": 1, "state_size": 8}
FALCON_H1 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8}
RECURRENT_GEMMA = {"lru_width": 64, "attention_window_size": 8}
LFM2 = {"layer_types": ["conv", "full_attention", "conv"]}

NO_CALLS = "0 of them call the engine's attention"
LINEAR = "it has layers of type linear_attention"

FAMILIES = [
    Family("Llama", note="grouped-query attention"),
    Family("Llama", config={"num_key_value_heads": 1, "rope_parameters": YARN}, note="one KV head, YaRN"),
    Family("Llama4", config=LLAMA4, config_class="Llama4TextConfig", note="chunked attention, experts"),
    Family("Qwen2", config={**MIXED, "use_sliding_window": True}, note="sliding window in some layers"),
    Family("Qwen3"),
    Family("Qwen3Moe", config=EXPERTS, note="experts"),
    Family("Mistral", config=SLIDING, note="sliding window"),
    Family("Ministral", config=MIXED, note="sliding window in some layers"),
    Family("Mixtral", config={"num_local_experts": 4}, note="experts"),
    Family("Gemma", config={"num_key_value_heads": 1}, note="one KV head"),
    Family("Gemma2", config={**GEMMA, "attn_logit_softcapping": 2.0}, note="softcap, sliding window in some layers"),
    Family("Gemma3", config=GEMMA, config_class="Gemma3TextConfig", note="sliding window and RoPE by layer"),
    Family(
        "GptOss",
        config={**MIXED, "num_local_experts": 4, "rope_parameters": YARN},
        note="sinks, sliding window, experts",
    ),
    Family("DeepseekV2", config={**MLA, "topk_method": "greedy"}, without=("head_dim",), note="MLA, experts"),
    Family("DeepseekV3", config=MLA, without=("head_dim",), note="MLA, experts"),
    Family("Cohere"),
    Family("Cohere2", config=MIXED, note="sliding window in some layers"),
    Family("Exaone4", config=MIXED, note="sliding window in some layers"),
    Family("Phi", config={"partial_rotary_factor": 0.5}, note="partial rotary"),
    Family("Phi3"),
    Family("SmolLM3"),
    Family("Olmo"),
    Family("Olmo2"),
    Family("Olmo3", config=MIXED, note="sliding window in some layers"),
    Family("Granite"),
    Family("GraniteMoe", config={"num_local_experts": 4}, note="experts"),
    Family("GPT2", config=GPT, without=NOT_GPT, model_class="GPT2LMHeadModel", note="learned positions"),
    Family("GPTBigCode", config=GPT, without=NOT_GPT, note="one KV head, learned positions"),
    Family("GPTJ", config={**GPT, "rotary_dim": 8}, without=NOT_GPT, note="partial rotary"),
    Family("GPTNeoX", config={"rotary_pct": 0.25}, without=ALL_HEADS, note="partial rotary"),
    Family(
        "OPT",
        config={"word_embed_proj_dim": 64, "ffn_dim": 96},
        without=("num_key_value_heads", "head_dim"),
        note="learned positions",
    ),
    Family("Starcoder2", config=SLIDING, note="sliding window"),
    Family("Glm"),
    Family("Glm4"),
    Family("StableLm"),
    Family("Ernie4_5"),
    Family("Nemotron"),
    Family("HunYuanDenseV1"),
    Family("Falcon", Served.ALONE, without=(*ALL_HEADS, "intermediate_size"), note=NO_CALLS),
    Family(
        "Bloom",
        Served.ALONE,
        config={"n_head": 4, "n_layer": 3},
        without=("head_dim", "num_key_value_heads"),
        note=NO_CALLS,
    ),
    Family("Mpt", Served.ALONE, config={"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256}, note=NO_CALLS),
    Family("Mamba", Served.ALONE, config={"state_size": 8}, note=LINEAR),
    Family("Mamba2", Served.ALONE, config=MAMBA2, note=LINEAR),
    Family("Jamba", Served.ALONE, config=JAMBA, note=LINEAR),
    Family("FalconH1", Served.ALONE, config=FALCON_H1, note="it has layers of type hybrid"),
    Family("Qwen3Next", Served.ALONE, config=QWEN3_NEXT, note=LINEAR),
    Family("Lfm2", Served.ALONE, config=LFM2, note="it has layers of type conv"),
    Family("MiniMax", Served.ALONE, config=MINIMAX, note=LINEAR),
    Family(
        "RecurrentGemma",
        Served.REFUSED,
        config={"lru_width": 64, "attention_window_size": 8},
        note="gives no cache away",
    ),
]


def table() -> str:
    """The families as ``docs/reference/models.md`` shows them."""
    rows = [f"| {family.name} | {family.served} | {family.note} |" for family in FAMILIES]
    return "\n".join(["| family | served | what is special, or why not in batches |", "|---|---|---|", *rows, ""])


def save(folder: Path, family: Family, **changes: Any) -> Path:
    """A random float32 model of ``family``; large weights, so that every part of it shows in its output."""
    import torch
    import transformers

    settings = {name: value for name, value in BASE.items() if name not in family.without}
    config_class = getattr(transformers, family.config_class or f"{family.name}Config")
    torch.manual_seed(0)
    config = config_class(**{**settings, **family.config, **changes})
    model = getattr(transformers, family.model_class or f"{family.name}ForCausalLM")(config)
    model.save_pretrained(folder)
    return folder
