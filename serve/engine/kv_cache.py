"""Keys and values of every slot, layer by layer.  Owned by the engine: nothing depends on transformers' caches."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable

import torch

from serve.engine.patterns import Pattern
from serve.engine.scheduler import Move


class KVCache:
    """For each layer keys and values of shape ``[num_slots, max_len, num_kv_heads, head_dim]``.

    A layer's tensors are made when it is first seen, so that the model itself says how many layers and heads it
    has, and keys and values may differ in size.

    Beyond the tokens of its own sequence a slot reads as zero where a batch may read it: a masked weight of 0 times
    a NaN that another request left there would be NaN.

    Args:
        num_slots: Sequences.
        max_len: Tokens of each.
        dtype: Of the model's keys and values.
        device: Where the model runs.
        patterns: What each layer sees, in the order of the layers.

    ``has_extras`` tells whether some layer's scores need softcaps or sinks, ``varlen`` the kernel of
    :mod:`serve.engine.flash` that attends over this cache, if one does.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        patterns: tuple[Pattern, ...] = (),
    ) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self.patterns = patterns
        self.has_extras = False
        self.varlen: Callable[..., torch.Tensor] | None = None
        self._num_written = [0] * num_slots
        self._dtype = dtype
        self._device = device
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._spare: dict[torch.Size, torch.Tensor] = {}
        """What is moved aside while two slots change places: a step must not ask for memory half-way."""

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The cache of one layer; ``key`` and ``value`` end in ``[..., num_kv_heads, head_dim]``."""
        found = self._layers.get(index)
        if found is None:
            found = self._make(key.shape[-2:]), self._make(value.shape[-2:])
            self._layers[index] = found
        return found

    def _make(self, shape: torch.Size) -> torch.Tensor:
        if shape not in self._spare:
            self._spare[shape] = _zeros((self.max_len, *shape), self._dtype, self._device)
        return _zeros((self.num_slots, self.max_len, *shape), self._dtype, self._device)

    @property
    def num_layers(self) -> int:
        """Layers seen so far."""
        return len(self._layers)

    @property
    def shapes(self) -> frozenset[tuple[tuple[int, int], tuple[int, int]]]:
        """``(num_kv_heads, head_dim)`` of keys and of values, as the layers have them."""
        return frozenset((_heads(key), _heads(value)) for key, value in self._layers.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers seen so far."""
        tensors = [tensor for pair in self._layers.values() for tensor in pair]
        return sum(tensor[0, 0].numel() * tensor.element_size() for tensor in tensors)

    def resized(self, num_slots: int, max_len: int) -> KVCache:
        """A cache of the same layers, all allocated."""
        made = KVCache(num_slots, max_len, self._dtype, self._device, self.patterns)
        made.has_extras, made.varlen = self.has_extras, self.varlen
        for index, (key, value) in self._layers.items():
            made.layer(index, key, value)
        return made

    def move(self, moves: Iterable[Move]) -> None:
        """Carry out the scheduler's moves, in order."""
        for move in moves:
            if move.is_swap:
                self._swap(move.source, move.target)
                continue
            for pair in self._layers.values():
                for tensor in pair:
                    tensor[move.target, : move.num_tokens] = tensor[move.source, : move.num_tokens]
            self.extend(move.target, move.num_tokens, move.num_tokens)

    def _swap(self, a: int, b: int) -> None:
        written = self._num_written
        length = max(written[a], written[b])
        for pair in self._layers.values():
            for tensor in pair:
                kept = self._spare[tensor.shape[2:]][:length].copy_(tensor[b, :length])
                tensor[b, :length] = tensor[a, :length]
                tensor[a, :length] = kept
        written[a], written[b] = written[b], written[a]

    def extend(self, slot: int, start: int, end: int) -> None:
        """Tokens ``start`` to ``end`` of a slot are written next; what another sequence left after ``start`` goes."""
        if self._num_written[slot] > start:
            for pair in self._layers.values():
                for tensor in pair:
                    tensor[slot, start : self._num_written[slot]] = 0
        self._num_written[slot] = end


def _heads(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.shape[-2], tensor.shape[-1]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take no memory before they are written, where the device can do that."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    # Private: reading an unwritten page of shared memory would allocate it.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    pages = mmap.mmap(-1, num_bytes, **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # A huge page for the first tokens of each slot and layer would take 2 GiB with 32 slots of the demo model.
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
