"""Tiny checkpoints for tests of loading: the files that a loader looks at, without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 2}


def safetensors(tensors: dict[str, bytes]) -> bytes:
    """A safetensors file of byte tensors, written from the format's description."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + b"".join(tensors.values())


def model_files(**config: Any) -> dict[str, bytes]:
    """What a small, complete model has."""
    return {
        "config.json": json.dumps(CONFIG | config).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors({"a": b"1234", "b": b"56"}),
    }


def sharded_files() -> dict[str, bytes]:
    """The same in two shards."""
    shards = {"model-00001-of-00002.safetensors": {"a": b"1234"}, "model-00002-of-00002.safetensors": {"b": b"56"}}
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    files = {name: data for name, data in model_files().items() if name != "model.safetensors"}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return files | {shard: safetensors(tensors) for shard, tensors in shards.items()}


def adapter_files(base: str, **config: Any) -> dict[str, bytes]:
    """A LoRA adapter of ``base``."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base} | config
    return {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": safetensors({"lora_A": b"12"}),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write ``files`` below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
