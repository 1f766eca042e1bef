"""What a GGUF file says of itself before its tensors: metadata, and how long everything before them is.

Only as much is read as is needed, so that a file at the Hub is not downloaded.  The engine serves no GGUF: this is
for a plan of the checkpoint that such a file was made from.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve.errors import ModelLoadError

MAGIC = b"GGUF"
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TEXT, ARRAY = 8, 9
INTEGERS = frozenset({0, 1, 2, 3, 4, 5, 10, 11})
MAX_KEPT = 1024
"""Of an array of integers: more than any model has layers."""

FIRST_READ, LARGEST_READ = 2**20, 2**28


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata (of long arrays only how many there are), bytes before the tensors, and parameters in these."""

    metadata: dict[str, Any]
    data_start: int
    num_parameters: int

    def number(self, key: str) -> int | None:
        """A value below the architecture's name, such as ``block_count``; None for anything but one number."""
        value = self._value(key)
        return int(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def numbers(self, key: str) -> list[int]:
        """The same of a list of numbers, one for each layer; empty for anything else."""
        value = self._value(key)
        return [int(one) for one in value] if isinstance(value, tuple) else []  # pyright: ignore

    def _value(self, key: str) -> Any:
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")

    @property
    def num_tokens(self) -> int:
        """Of the vocabulary; 0 where the file does not say."""
        found = self.metadata.get("tokenizer.ggml.tokens")
        return found.count if isinstance(found, LongArray) else 0


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array of which only the length was kept."""

    count: int


class _TooShort(Exception):
    """More bytes are needed."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self._data):
            raise _TooShort
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(FORMATS[kind])
        inner, count = self.number("<I"), self.number("<Q")
        if inner in FORMATS:
            raw = self.take(count * struct.calcsize(FORMATS[inner]))
            if inner in INTEGERS and count <= MAX_KEPT:
                return struct.unpack(f"<{count}{FORMATS[inner][1]}", raw)
        else:
            for _ in range(count):
                self.value(inner)
        return LongArray(count)


def read_gguf(read: Callable[[int], bytes], name: str) -> GgufHeader:
    """The header of a GGUF file.

    Args:
        read: Gives the first bytes of the file, as many as asked for or all.
        name: What messages call it.

    Raises:
        ModelLoadError: it is no GGUF file, or its header is broken.
    """
    count = FIRST_READ
    while True:
        data = read(count)
        try:
            return _parse(_Reader(data), name)
        except _TooShort:
            if len(data) < count or count >= LARGEST_READ:
                raise ModelLoadError(f"{name} is cut short: its header does not end; download it again") from None
            count *= 4
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError, struct.error, MemoryError):
            raise ModelLoadError(f"{name} has a GGUF header that cannot be read; download it again") from None


def _parse(reader: _Reader, name: str) -> GgufHeader:
    if reader.take(4) != MAGIC:
        raise ModelLoadError(f"{name} is not a GGUF file")
    reader.number("<I")
    num_tensors, num_values = reader.number("<Q"), reader.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = reader.text()
        metadata[key] = reader.value(reader.number("<I"))
    num_parameters = 0
    for _ in range(num_tensors):
        reader.text()
        size = 1
        for _ in range(reader.number("<I")):
            size *= reader.number("<Q")
        num_parameters += size
        reader.take(12)
    alignment = metadata.get("general.alignment", 32)
    return GgufHeader(metadata, -(-reader.at // alignment) * alignment, num_parameters)
