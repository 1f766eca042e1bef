"""The kernels of ``serve/engine/kernels``, which :mod:`serve.kernels` compiles: loading, and linear layers.

They compute in bfloat16 on CPUs with AVX-512 BF16.  A row's result has the same bits whatever else is in the batch,
which no kernel of torch's promises.  Where there is no library, another CPU or another number format, the engine does
without them.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from serve import kernels

logger = logging.getLogger(__name__)

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

TOLERANCE = 0.02
"""Of the trial, whose results are about 1: bfloat16 keeps 8 bits."""

NAMESPACE = "trimaran"


class Library:
    """The compiled functions, and OpenMP's of the library that torch itself runs on.

    Args:
        path: Of the shared library.
        parallel: The address of ``GOMP_parallel``; None: one thread computes.
    """

    def __init__(self, path: Path, parallel: int | None) -> None:
        self._functions = ctypes.CDLL(str(path))
        self.parallel = parallel
        self.linear = self._function("linear", [POINTER, *[INT] * 4, *[POINTER] * 4, INT])
        self.linear_pack = self._function("linear_pack", [POINTER, INT, INT, POINTER])
        self.linear_packed_size = self._function("linear_packed_size", [INT, INT], INT)
        self.attend = self._function("attend", [POINTER, POINTER, INT])
        self.rms_norm = self._function("rms_norm", [POINTER, *[INT] * 3, POINTER, FLOAT, POINTER, POINTER, INT])
        self.silu_gate = self._function("silu_gate", [*[POINTER, INT] * 2, INT, INT, POINTER, POINTER, INT])
        self.rotate = self._function("rotate", [POINTER, *[INT] * 5, *[POINTER] * 4, INT])
        self.attend_scratch_size = self._function("attend_scratch_size", [INT, INT, INT], INT)

        self._own = threading.local()

    def scratch(self, num_bytes: int) -> Tensor:
        """Memory for the kernel's own use, the same in all calls of a thread: while one computes, others may."""
        found: Tensor | None = getattr(self._own, "scratch", None)
        if found is None or found.shape[0] < num_bytes:
            found = self._own.scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return found

    def _function(self, name: str, types: list[Any], result: Any = None) -> Any:
        found = getattr(self._functions, name)
        found.argtypes, found.restype = types, result
        return found


@cache
def library() -> Library | None:
    """The kernels, if they are here and prove right; else None, with the reason logged.  Looked for once."""
    reason = kernels.obstacle()
    found = None
    if reason is None:
        try:
            found = Library(kernels.library(), _gomp_parallel())
            off_by = _trial(found)
            if not off_by <= TOLERANCE:
                found, reason = None, f"they are off by {off_by:.2g} here"
        except (OSError, AttributeError) as error:
            found, reason = None, str(error)
    logger.info("Kernels: %s", f"torch's ({reason})" if reason else "compiled for this CPU's AVX-512 BF16")
    return found


def _gomp_parallel() -> int | None:
    """Where torch's own OpenMP is in memory; a second one beside it would keep threads of its own."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, POINTER).value
    return None


def _trial(found: Library) -> float:
    """The largest difference of a small layer from torch's."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(size, generator=generator).to(torch.bfloat16) for size in ((83, 70), (83,)))
    x = torch.randn(9, 70, generator=generator).to(torch.bfloat16)
    got = linear(found, x, pack(found, weight * 0.1), bias, weight.shape)
    return float((got.float() - functional.linear(x.float(), weight.float() * 0.1, bias.float())).abs().amax()) / 3


def can_pack(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels compute with ``[out_features, in_features]`` and ``[out_features]``."""
    if bias is not None and not (bias.dtype is weight.dtype and bias.is_contiguous() and len(bias) == len(weight)):
        return False
    is_for_kernels = weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
    return is_for_kernels and weight.numel() > 0 and weight.shape[1] % 2 == 0


def pack(found: Library, weight: Tensor) -> Tensor:
    """A weight, ``[out_features, in_features]``, in the order in which the kernel reads it: ``[numbers]``."""
    out_features, in_features = weight.shape
    weight = weight.contiguous()
    panels = weight.new_empty(found.linear_packed_size(in_features, out_features))
    found.linear_pack(weight.data_ptr(), in_features, out_features, panels.data_ptr())
    return panels


def linear(found: Library, x: Tensor, panels: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """``[..., in_features]`` to ``[..., out_features]``, as :func:`torch.nn.functional.linear`.

    ``sizes`` are those of the weight.
    """
    out_features, in_features = sizes
    # The kernel itself checks nothing: it would read and write whatever lies beyond.
    if x.dtype is not torch.bfloat16:
        raise TypeError(f"x must be bfloat16, not {x.dtype}")
    if x.shape[-1] != in_features:
        raise ValueError(f"x must end in {in_features} features, not in {x.shape[-1]}")
    if not x.is_contiguous():
        x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], out_features)
    found.linear(
        *(x.data_ptr(), in_features, x.numel() // in_features, in_features, out_features, panels.data_ptr()),
        *(None if bias is None else bias.data_ptr(), out.data_ptr(), found.parallel, torch.get_num_threads()),
    )
    return out


class CompiledLinear(nn.Module):
    """A linear layer without ``weight``: nothing may read the packed numbers as a matrix.

    Args:
        found: With the kernel.
        weight: ``[out_features, in_features]`` that :func:`can_pack`, together with ``bias``.
        bias: ``[out_features]``.
    """

    def __init__(self, found: Library, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._sizes = self.out_features, self.in_features
        self.bias = bias
        self._library, self._panels = found, pack(found, weight)
        _layers[id(self._panels)] = self

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, as an operator that a recorder sees."""
        return operator()(x, self._panels, self.bias, self.out_features)

    def compute(self, x: Tensor) -> Tensor:
        """The same, without torch's dispatcher."""
        return linear(self._library, x, self._panels, self.bias, self._sizes)


_layers: WeakValueDictionary[int, CompiledLinear] = WeakValueDictionary()


def layer_of(panels: Tensor) -> CompiledLinear:
    """Whose tensor this is."""
    return _layers[id(panels)]


@cache
def operator() -> Any:
    """:func:`linear` as one of torch's operators."""
    _declared.define("linear(Tensor x, Tensor panels, Tensor? bias, int out_features) -> Tensor")
    _declared.impl("linear", _linear, "CPU")
    return getattr(torch.ops, NAMESPACE).linear.default


def _linear(x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int) -> Tensor:  # noqa: ARG001 - the schema's
    return layer_of(panels).compute(x)


_declared: Any = torch.library.Library(NAMESPACE, "DEF")
