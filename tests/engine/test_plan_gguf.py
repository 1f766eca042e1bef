"""`trimaran plan` of GGUF files: by their headers, whole or split, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from serve.errors import ConfigError, ModelLoadError
from trimaran.plan.need import examine


def save(path: Path, tensors: dict[str, Any], kv_heads: Any = 2) -> int:
    """A GGUF file of a llama of three layers; gives the bytes of its tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(kv_heads)
    writer.add_context_length(256)
    writer.add_token_list([f"t{number}" for number in range(300)])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(tensor.nbytes for tensor in tensors.values())


def numbers(rows: int, kind: str = "float16") -> Any:
    import numpy as np

    return np.zeros((rows, 64), dtype=kind)


def test_gguf_is_planned_by_its_header(tmp_path):
    path = tmp_path / "tiny.gguf"
    num_bytes = save(path, {"a": numbers(32), "b": numbers(8, "float32")})
    need = examine(str(path), None, None)
    assert need.num_parameters == 40 * 64
    assert need.weight_bytes == num_bytes
    assert need.kv_bytes_per_token == 2 * 3 * 2 * 16 * 2
    assert (need.context, need.vocab_size) == (256, 300)
    assert "serves no GGUF" in need.notes[0]
    with pytest.raises(ConfigError, match="256"):
        examine(str(path), None, 300)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelLoadError, match="cut short"):
        examine(str(path), None, None)


def test_split_gguf_is_all_of_its_parts(tmp_path):
    sizes = [save(tmp_path / f"m-{number:05d}-of-00002.gguf", {f"t{number}": numbers(8 * number)}) for number in (1, 2)]
    first = str(tmp_path / "m-00001-of-00002.gguf")
    need = examine(first, None, None)
    assert (need.num_parameters, need.weight_bytes) == (24 * 64, sum(sizes))
    assert examine(str(tmp_path), None, None, "m-00002-of-00002.gguf").weight_bytes == sum(sizes)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ConfigError, match="00002-of-00002"):
        examine(first, None, None)


def test_layers_with_heads_of_their_own_are_summed_up(tmp_path):
    save(tmp_path / "m.gguf", {"a": numbers(1)}, kv_heads=[2, 1, 1])
    assert examine(str(tmp_path / "m.gguf"), None, None).kv_bytes_per_token == 2 * (2 + 1 + 1) * 16 * 2


@pytest.mark.parametrize("alignment", [0, "wide"])
def test_gguf_with_a_header_of_nonsense_is_refused(alignment, tmp_path):
    key = b"general.alignment"
    value = struct.pack("<II", 4, alignment) if isinstance(alignment, int) else struct.pack("<IQ4s", 8, 4, b"wide")
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + value
    (tmp_path / "m.gguf").write_bytes(header)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        examine(str(tmp_path / "m.gguf"), None, None)
