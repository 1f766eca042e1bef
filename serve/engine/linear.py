"""Linear layers on the CPU, their weights reordered once into the layout that oneDNN computes in.

Without it oneDNN reorders each weight again in every call, which costs more than a decode step's arithmetic.  The two
operators are torch's own, but private (torch.compile's freezing uses them): they are tried on a small case first, and
the model's logits are compared before and after.  Where anything differs the model stays as it was.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from serve.engine import huge_pages
from serve.engine.device import available_ram
from serve.engine.joint import Joint, JointLinear, neighbours, side_by_side

logger = logging.getLogger(__name__)

ROWS_HINT = 8
"""For how many rows oneDNN chooses the layout; other counts run as well, at much the same speed."""

PLAIN_SHARE = 0.2
"""Of the free memory: so much may plain weights take, for single rows, beside the packed ones."""

MEMORY_SHARE = 0.4
"""Of the free memory; the KV cache wants the rest.  The packed weights are a second copy until the first is dropped."""

PACKABLE = frozenset({torch.float32, torch.bfloat16, torch.float16})

EXACT_ROWS, FINE_ROWS = 16, 128
"""Up to the first every number of rows has kernels of its own, up to the second every fourth, then every sixteenth."""

TOLERANCE = 0.1
"""Of the spread of the logits.  Other kernels round bfloat16 sums differently; a wrong layout is off by the spread."""


class PackedLinear(nn.Module):
    """A linear layer without ``weight``: nothing may read the packed numbers as a matrix.

    Args:
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``.
        keeps_plain: Multiply single rows with the weight as it is, which stays in memory for that.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, keeps_plain: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = _reorder(weight)
        self._plain = weight if keeps_plain else None
        _layers[id(self._packed)] = self

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in a number of rows that there are kernels for."""
        num_rows = x.numel() // self.in_features
        if num_rows == 1 and self._plain is not None:
            return _apply_plain(x, self._plain, self.bias)
        num_padding = padded_rows(num_rows) - num_rows
        if not num_padding:
            return _apply(x, self._packed, self.bias)
        rows = functional.pad(x.reshape(num_rows, self.in_features), (0, 0, 0, num_padding))
        return _apply(rows, self._packed, self.bias)[:num_rows].view(*x.shape[:-1], self.out_features)


_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()


def layer_of(packed: Tensor) -> PackedLinear:
    """Whose tensor this is."""
    return _layers[id(packed)]


def padded_rows(num_rows: int) -> int:
    """The rows that are computed in place of ``num_rows``.

    oneDNN writes machine code for each number of rows and each shape of a weight, and never drops all of it: about half
    a MiB, so that prompts of every length would add more than a GiB to a small model.
    """
    step = 1 if num_rows <= EXACT_ROWS else 4 if num_rows <= FINE_ROWS else 16
    return -(-num_rows // step) * step


def _reorder(weight: Tensor) -> Tensor:
    operators: Any = torch.ops.mkldnn
    return operators._reorder_linear_weight(weight, ROWS_HINT)


def _apply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    operators: Any = torch.ops.mkldnn
    return operators._linear_pointwise(x, packed, bias, "none", [], "")


def _apply_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """With torch's own kernel, which reads a weight row by row, faster than oneDNN does when there is one row of ``x``.

    It is used where oneDNN is off, and that is a switch of the whole process: other threads compute the same meanwhile.
    """
    switch: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    switch._set_mkldnn_enabled(False)
    try:
        return functional.linear(x, weight, bias)
    finally:
        switch._set_mkldnn_enabled(True)


def reads_plain(dtype: torch.dtype) -> bool:
    """Whether single rows are multiplied faster with a weight as it is: measured with bfloat16 and AVX-512."""
    if dtype is not torch.bfloat16 or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        weight, x = torch.ones(48, 32, dtype=dtype), torch.ones(1, 32, dtype=dtype)
        return torch.equal(_apply_plain(x, weight, None), functional.linear(x, weight))
    except (AttributeError, RuntimeError, TypeError):
        return False


def is_usable(dtype: torch.dtype) -> bool:
    """Whether this torch has the private operators and they agree with :func:`torch.nn.functional.linear`."""
    try:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(64, 32, generator=generator).to(dtype)
        x = torch.randn(4, 32, generator=generator).to(dtype)
        got = _apply(x, _reorder(weight), None)
        return torch.allclose(got.float(), functional.linear(x, weight).float(), atol=0.1, rtol=0.02)
    except (AttributeError, RuntimeError, TypeError):
        return False


def pack(model: nn.Module) -> int:
    """Pack every plain :class:`torch.nn.Linear` of a model on the CPU, in place, its own attention still chosen.

    Returns:
        How many layers were packed; 0 where it is not possible, not correct or too large, with the reason logged.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.dtype in PACKABLE
    ]
    linears = [child for _, _, child in places]
    size = sum(linear.weight.nbytes for linear in linears)
    obstacle = _obstacle(size, {linear.weight.dtype for linear in linears})
    keeps_plain, groups = False, list[list[nn.Linear]]()
    if obstacle is None:
        expected: list[Tensor] = []
        groups = neighbours(lambda: expected.append(_logits(model)), linears)
        keeps_plain = size <= PLAIN_SHARE * available_ram() and all(reads_plain(each.weight.dtype) for each in linears)
        packed = _packed(linears, groups, keeps_plain)
        for parent, name, child in places:
            setattr(parent, name, packed[child])
        obstacle = _difference(model, expected[0])
        if obstacle is not None:
            for parent, name, child in places:
                setattr(parent, name, child)
    if obstacle is not None:
        logger.info("Linear layers: as they are (%s)", obstacle)
        return 0
    num_joined = sum(map(len, groups))
    single = "the weights as they were, kept beside them" if keeps_plain else "them, too"
    logger.info(
        "Linear layers: %d packed for this CPU, %d MiB; %d of them joined; single rows are multiplied with %s",
        *(len(linears), size >> 20, num_joined, single),
    )
    huge_pages.start(size)
    return len(linears)


def _packed(linears: list[nn.Linear], groups: list[list[nn.Linear]], keeps_plain: bool) -> dict[nn.Linear, nn.Module]:
    """What takes the place of each."""
    packed: dict[nn.Linear, nn.Module] = {}
    for group in groups:
        joint = Joint(PackedLinear(*side_by_side(group), keeps_plain), [linear.out_features for linear in group])
        packed |= {linear: JointLinear(linear, joint, index) for index, linear in enumerate(group)}
    alone = [linear for linear in linears if linear not in packed]
    return packed | {linear: PackedLinear(linear.weight.detach(), linear.bias, keeps_plain) for linear in alone}


def _obstacle(size: int, dtypes: set[torch.dtype]) -> str | None:
    if not dtypes:
        return "none that can be packed"
    free = available_ram()
    if size > MEMORY_SHARE * free:
        return f"a second copy of {size >> 20} MiB would leave too little of the {free >> 20} MiB that are free"
    if not all(is_usable(dtype) for dtype in dtypes):
        return "this torch or CPU has no packed operators"
    return None


def _difference(model: nn.Module, expected: Tensor) -> str | None:
    try:
        off = float((_logits(model) - expected).abs().max() / expected.std())
    except (AttributeError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None if off <= TOLERANCE else f"packed, its logits are off by {off:.2g} of their spread"


def _logits(model: nn.Module) -> Tensor:
    config: Any = model.config
    vocab_size: int = config.get_text_config().vocab_size
    token_ids = torch.arange(3, 15)[None] % vocab_size
    output = model(input_ids=token_ids, use_cache=False)
    return output.logits[0].float()
