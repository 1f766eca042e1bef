"""Keys and values of every slot, layer by layer.  Owned by the engine: nothing depends on transformers' caches."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from serve.engine.compiled import Library
from serve.engine.patterns import Pattern
from serve.engine.scheduler import Move
from serve.engine.transfer import on_device

BLOCK_LEN = 128
"""Tokens of a block, at most."""

Room = dict[tuple[int, ...], Tensor]
"""Memory for copies, kept from step to step: new memory can cost more than the copy itself."""

Shape = tuple[int, int]
"""``(num_kv_heads, head_dim)``."""


def in_blocks(device: torch.device, varlen: Callable[..., Tensor] | None) -> bool:
    """Which of its two layouts a cache has: the one that :mod:`serve.engine.blocks` multiplies, or the GPU's."""
    return device.type == "cpu" and varlen is None


class KVCache:
    """Keys and values of each layer, in one of two layouts (:func:`in_blocks`).

    On a GPU ``[num_slots, max_len, num_kv_heads, head_dim]``.  On a CPU ``[num_blocks, num_slots, num_kv_heads,
    block_len, head_dim]``, where the same block of neighbouring slots lies in one piece, each head's keys in a row.

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
        kernels: Those that attend over this cache, if they do (:mod:`serve.engine.tiles`).

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
        kernels: Library | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self.block_len = min(max_len, BLOCK_LEN) if kernels is None else BLOCK_LEN
        self.patterns = patterns
        self.has_extras = False
        self.varlen: Callable[..., Tensor] | None = None
        self.kernels = kernels
        self.room: Room = {}
        self._num_written = [0] * num_slots
        self._dtype = dtype
        self._device = device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._shapes: dict[int, tuple[Shape, Shape]] = {}
        self._spare: dict[Shape, Tensor] = {}
        """What is moved aside while two slots change places: a step must not ask for memory half-way."""

    @property
    def in_blocks(self) -> bool:
        """Whether the layout is that of blocks."""
        return in_blocks(self._device, self.varlen)

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The cache of one layer; ``key`` and ``value`` end in ``[..., num_kv_heads, head_dim]``."""
        found = self._layers.get(index)
        if found is None:
            shapes = _shape(key), _shape(value)
            found = self._make(shapes[0]), self._make(shapes[1])
            self._layers[index], self._shapes[index] = found, shapes
        return found

    def _make(self, shape: Shape) -> Tensor:
        if shape not in self._spare:
            self._spare[shape] = self._slots(1, shape)
        return self._slots(self.num_slots, shape)

    def _slots(self, count: int, shape: Shape) -> Tensor:
        num_heads, head_dim = shape
        sizes = (count, self.max_len, num_heads, head_dim)
        if self.in_blocks:
            sizes = (-(-self.max_len // self.block_len), count, num_heads, self.block_len, head_dim)
        return _zeros(sizes, self._dtype, self._device)

    @property
    def num_layers(self) -> int:
        """Layers seen so far."""
        return len(self._layers)

    @property
    def shapes(self) -> frozenset[tuple[Shape, Shape]]:
        """``(num_kv_heads, head_dim)`` of keys and of values, as the layers have them."""
        return frozenset(self._shapes.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers seen so far."""
        return self._dtype.itemsize * sum(math.prod(shape) for pair in self._shapes.values() for shape in pair)

    def resized(self, num_slots: int, max_len: int) -> KVCache:
        """A cache of the same layers, all allocated."""
        made = KVCache(num_slots, max_len, self._dtype, self._device, self.patterns, self.kernels)
        made.has_extras, made.varlen = self.has_extras, self.varlen
        for index, (key, value) in self._shapes.items():
            made.layer(index, torch.empty(key, device="meta"), torch.empty(value, device="meta"))
        return made

    def rows(self, slots: Sequence[int], positions: Sequence[int]) -> dict[int, Tensor]:
        """Where :func:`write` puts new tokens, by the number of heads."""
        head_counts = {num_heads for pair in self._shapes.values() for num_heads, _ in pair}
        if not self.in_blocks:
            places = [slot * self.max_len + position for slot, position in zip(slots, positions, strict=True)]
            return dict.fromkeys(head_counts, on_device(places, self._device))
        size, found = self.block_len, dict[int, Tensor]()
        for num_heads in head_counts:
            step = num_heads * size
            firsts = [
                (position // size * self.num_slots + slot) * step + position % size
                for slot, position in zip(slots, positions, strict=True)
            ]
            found[num_heads] = on_device(firsts, self._device)[:, None] + torch.arange(0, step, size)
        return found

    def tokens(self, tensor: Tensor, slot: int, start: int, end: int) -> list[Tensor]:
        """Views of a layer's ``tensor`` that hold tokens ``start`` to ``end`` of a slot, and nothing else."""
        if not self.in_blocks:
            return [tensor[slot, start:end]]
        size, views = self.block_len, list[Tensor]()
        while start < end:
            block, first = divmod(start, size)
            if first == 0 and end - start >= size:
                views.append(tensor[block : end // size, slot])
                start = end // size * size
            else:
                last = min(size, first + end - start)
                views.append(tensor[block, slot, :, first:last])
                start += last - first
        return views

    def move(self, moves: Iterable[Move]) -> None:
        """Carry out the scheduler's moves, in order."""
        for move in moves:
            if move.is_swap:
                self._swap(move.source, move.target)
                continue
            for tensor in self._tensors():
                self._copy(tensor, move.target, tensor, move.source, move.num_tokens)
            self.extend(move.target, move.num_tokens, move.num_tokens)

    def _swap(self, a: int, b: int) -> None:
        written = self._num_written
        length = max(written[a], written[b])
        for index, pair in self._layers.items():
            for shape, tensor in zip(self._shapes[index], pair, strict=True):
                spare = self._spare[shape]
                self._copy(spare, 0, tensor, b, length)
                self._copy(tensor, b, tensor, a, length)
                self._copy(tensor, a, spare, 0, length)
        written[a], written[b] = written[b], written[a]

    def _copy(self, to: Tensor, target: int, of: Tensor, source: int, num_tokens: int) -> None:
        views = self.tokens(to, target, 0, num_tokens), self.tokens(of, source, 0, num_tokens)
        for new, old in zip(*views, strict=True):
            new.copy_(old)

    def extend(self, slot: int, start: int, end: int) -> None:
        """Tokens ``start`` to ``end`` of a slot are written next; what another sequence left after ``start`` goes.

        Raises:
            IndexError: there is no such place; the compiled kernel would write to it all the same.
        """
        if slot < 0 or end > self.max_len:
            raise IndexError(
                f"slot {slot}, token {end - 1}: the cache has {self.num_slots} slots of {self.max_len} tokens"
            )
        if self._num_written[slot] > start:
            for tensor in self._tensors():
                for view in self.tokens(tensor, slot, start, self._num_written[slot]):
                    view.zero_()
        self._num_written[slot] = end

    def _tensors(self) -> list[Tensor]:
        return [tensor for pair in self._layers.values() for tensor in pair]


def write(tensor: Tensor, rows: dict[int, Tensor], new: Tensor) -> None:
    """Put ``new``, ``[T, num_kv_heads, head_dim]``, where :meth:`KVCache.rows` says, in a layer's ``tensor``."""
    places = rows[new.shape[1]]
    if places.dim() == 1:
        tensor.flatten(0, 1).index_copy_(0, places, new)
    else:
        tensor.view(-1, new.shape[2]).index_put_((places,), new)


def _shape(tensor: Tensor) -> Shape:
    return tensor.shape[-2], tensor.shape[-1]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
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
