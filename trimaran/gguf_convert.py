"""A Llama GGUF file to a Hugging Face folder: bfloat16 safetensors, configuration, exact tokenizer, chat template.

The file is read once, one tensor is in memory at a time, and neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from serve.errors import ModelLoadError

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # gguf.TokenType.CONTROL


def convert(gguf_file: Path, folder: Path) -> None:
    """Write ``gguf_file`` as a model into the existing ``folder``; progress goes to stderr.

    Raises:
        ModelLoadError: the file is not a Llama with a SmolLM tokenizer; nothing else is understood.
    """
    from gguf import GGUFReader  # noqa: PLC0415  (only this command needs it)

    click.echo("Reading the model file ...", err=True)
    reader = GGUFReader(gguf_file)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_unknown(fields)
    tensors: list[Any] = list(reader.tensors)
    is_tied = all(tensor.name != "output.weight" for tensor in tensors)

    _write_json(folder / "config.json", _config(fields, is_tied=is_tied))
    _write_json(folder / "generation_config.json", _special_ids(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8", newline="\n")
    _write_tokenizer(folder / "tokenizer.json", fields)
    _write_weights(folder / "model.safetensors", tensors, fields)


def _refuse_unknown(fields: dict[str, Any]) -> None:
    found = tuple(fields.get(name) for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if found != ("llama", "gpt2", "smollm"):
        raise ModelLoadError(
            f"this GGUF file holds architecture, tokenizer and pre-tokenizer {found}, and only "
            "('llama', 'gpt2', 'smollm') is converted: use the model's safetensors version"
        )


def _config(fields: dict[str, Any], *, is_tied: bool) -> dict[str, Any]:
    def of(name: str) -> Any:
        return fields[f"llama.{name}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": of("vocab_size"),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("rope.dimension_count"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": _shortest(of("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(of("rope.freq_base")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": is_tied,
        **_special_ids(fields),
    }


def _shortest(value: float) -> float:
    # GGUF stores float32: 1e-05 reads back as 9.999999747378752e-06 otherwise.
    return float(str(np.float32(value)))


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    ids = {**_special_ids(fields), "unk_token_id": fields["tokenizer.ggml.unknown_token_id"]}
    return {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer would rebuild it without the digit splitting.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **{name.removesuffix("_id"): tokens[token_id] for name, token_id in ids.items()},
    }


def _write_tokenizer(path: Path, fields: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(path), pretty=False)


def _write_weights(path: Path, tensors: list[Any], fields: dict[str, Any]) -> None:
    """Write ``tensors`` in the safetensors format: the length of a JSON header, the header, the raw numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF lists the fastest dimension first
        end = offset + 2 * int(np.prod(shape))
        header[_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weights in _with_progress(tensors, fields):
            file.write(weights.data)


def _with_progress(tensors: list[Any], fields: dict[str, Any]) -> Iterator[NDArray[np.uint16]]:
    from gguf import dequantize  # noqa: PLC0415

    num_heads = {
        "attn_q": int(fields["llama.attention.head_count"]),
        "attn_k": int(fields["llama.attention.head_count_kv"]),
    }
    with click.progressbar(tensors, label="Converting the weights", file=sys.stderr) as bar:
        for tensor in bar:
            weights: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
            if heads := num_heads.get(tensor.name.split(".")[-2]):
                weights = _undo_rotary_order(weights, heads)
            yield to_bfloat16(weights)


def _name(gguf_name: str) -> str:
    match gguf_name.split("."):
        case ["blk", layer, part, "weight"] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
        case _ if gguf_name in _TOP_NAMES:
            return _TOP_NAMES[gguf_name]
        case _:
            raise ModelLoadError(f"this GGUF file has a tensor {gguf_name!r} that a plain Llama does not have")


def _undo_rotary_order(weights: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    # GGUF interleaves the two halves of each head (pairs side by side); Hugging Face keeps the halves apart.
    rows, columns = weights.shape
    pairs = weights.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 numbers to bfloat16, ties to even, as bit patterns (NumPy has no bfloat16)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
