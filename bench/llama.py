"""The demo model for llama.cpp: a GGUF file in bfloat16, which the other servers have, from the one in the wheel."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench.processes import BenchError
from trimaran import demo_model

CONTEXT = 4096
"""Tokens of llama.cpp's cache; its server works one request at a time."""


def model_file() -> Path:
    """The file, made when it is not there yet."""
    target = demo_model.default_cache() / "bench" / f"{demo_model.NAME}-BF16.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            _widen(demo_model.download_gguf(Path(scratch)), made)
            made.replace(target)
    return target


def _widen(quantized: Path, target: Path) -> None:
    """The same fields, and tensors of the same numbers in bfloat16; norms stay float32."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, quants  # noqa: PLC0415

    reader = GGUFReader(quantized)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in {"general.architecture", "general.file_type"}:
            continue
        kind = entry.types[0]
        writer.add_key_value(name, entry.contents(), kind, entry.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        numbers: Any = quants.dequantize(tensor.data, tensor.tensor_type)
        if numbers.ndim == 1:
            writer.add_tensor(tensor.name, numbers)
        else:
            packed = quants.quantize(numbers, GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, packed, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def version(environment: Path) -> str:
    """What is installed there, in words.

    Raises:
        BenchError: there is no llama-cpp-python in that environment.
    """
    found = next(environment.glob("lib/python*/site-packages/llama_cpp_python-*.dist-info"), None)
    if found is None:
        raise BenchError(
            f"{environment} is no virtual environment with llama-cpp-python; docs/benchmarks.md says how to make one"
        )
    return f"llama.cpp by llama-cpp-python {found.name.removesuffix('.dist-info').partition('-')[2]}"
