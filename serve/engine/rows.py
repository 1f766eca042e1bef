"""What a model does between its matrices, by the compiled kernels: in place of :mod:`serve.engine.peephole`'s own.

Every intermediate result that torch would round to bfloat16 is rounded here, too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from serve.engine import compiled
from serve.engine.compiled import Library

ROTARY_STEP = 32
"""Half of a head is whole registers."""


class Rows:
    """Functions of rows of bfloat16."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As :func:`serve.engine.peephole.rms_norm`."""
        x, size = x.contiguous(), x.shape[-1]
        if weight.numel() != size:  # a weight for all numbers, beyond which the kernel would read
            weight = weight.expand(size).contiguous()
        out = torch.empty_like(x)
        self._library.rms_norm(
            *(x.data_ptr(), size, x.numel() // size, size, weight.data_ptr(), eps, out.data_ptr()),
            *(self._library.parallel, torch.get_num_threads()),
        )
        return out

    def silu_gate(self, x: Tensor, y: Tensor) -> Tensor:
        """``silu(x) * y``."""
        if x.shape != y.shape:
            return functional.silu(x) * y
        x, y, size = _rows(x), _rows(y), x.shape[-1]
        out = x.new_empty(x.shape)
        self._library.silu_gate(
            *(x.data_ptr(), x.stride(-2), y.data_ptr(), y.stride(-2), x.numel() // size, size, out.data_ptr()),
            *(self._library.parallel, torch.get_num_threads()),
        )
        return out

    def rotated(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """As :func:`serve.engine.peephole.rotated`, of ``[1, num_heads, n, head_dim]``."""
        _, num_heads, num_rows, size = x.shape
        out = x.new_empty(1, num_heads, num_rows, size)
        cosines, sines = cosines.contiguous(), sines.contiguous()
        self._library.rotate(
            *(x.data_ptr(), x.stride(1), x.stride(2), num_heads, num_rows, size),
            *(cosines.data_ptr(), sines.data_ptr(), out.data_ptr()),
            *(self._library.parallel, torch.get_num_threads()),
        )
        return out

    def rotated_pair(self, x: Tensor, cosines: Tensor, sines: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """As :func:`serve.engine.peephole.rotated_pair`."""
        whole = self.rotated(x, cosines, sines)
        return whole.narrow(1, 0, sizes[0]), whole.narrow(1, sizes[0], sizes[1])


def _rows(x: Tensor) -> Tensor:
    """With rows that follow each other at one distance."""
    is_flat = x.dim() >= 2 and x.numel() == x.shape[-1] * x.shape[-2] and x.stride(-1) == 1
    return x if is_flat else x.contiguous()


def find(dtype: torch.dtype, device: torch.device) -> Rows | None:
    """The kernels, where they compute in this number format."""
    library = compiled.library() if dtype is torch.bfloat16 and device.type == "cpu" else None
    return None if library is None else Rows(library)
