"""Linear layers on the CPU, their weights reordered once into the layout that their kernel reads.

That is Trimaran's own kernel where it is compiled for this CPU and number format (:mod:`serve.engine.compiled`), else
oneDNN's, which reorders a weight anew in every call otherwise, for longer than a decode step's arithmetic takes.
oneDNN's two operators are torch's, but private (torch.compile's freezing uses them): they are tried on a small case
first.  The model's logits are compared before and after; where anything differs the model stays as it was.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from serve.engine import compiled, huge_pages
from serve.engine.device import available_ram
from serve.engine.gate import TOLERANCE, off_by
from serve.engine.joint import Joint, JointLinear, neighbours, side_by_side
from serve.engine.survey import probe_tokens

logger = logging.getLogger(__name__)

ROWS_HINT = 8
"""For how many rows oneDNN chooses the layout; other counts run as well, at much the same speed."""

MEMORY_SHARE = 0.4
"""Of the free memory; the KV cache wants the rest.  The packed weights are a second copy until the first is dropped."""

PACKABLE = frozenset({torch.float32, torch.bfloat16, torch.float16})

NUM_PROBES = 12
"""Tokens whose logits are compared."""

EXACT_ROWS, FINE_ROWS = 16, 128
"""Up to the first every number of rows has kernels of its own, up to the second every fourth, then every sixteenth."""


class PackedLinear(nn.Module):
    """A linear layer of oneDNN's, without ``weight``: nothing may read the packed numbers as a matrix.

    Args:
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = _reorder(weight)
        _layers[id(self._packed)] = self

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in a number of rows that there are kernels for."""
        num_rows = x.numel() // self.in_features
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
    obstacle = _obstacle(size, linears)
    groups = list[list[nn.Linear]]()
    if obstacle is None:
        expected: list[Tensor] = []
        groups = neighbours(lambda: expected.append(_logits(model)), linears)
        packed = _packed(linears, groups)
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
    logger.info(
        "Linear layers: %d packed for this CPU, %d MiB; %d of them joined", len(linears), size >> 20, num_joined
    )
    huge_pages.start(size)
    return len(linears)


def _packed(linears: list[nn.Linear], groups: list[list[nn.Linear]]) -> dict[nn.Linear, nn.Module]:
    """What takes the place of each."""
    packed: dict[nn.Linear, nn.Module] = {}
    for group in groups:
        joint = Joint(_layer(*side_by_side(group)), [linear.out_features for linear in group])
        packed |= {linear: JointLinear(linear, joint, index) for index, linear in enumerate(group)}
    alone = [linear for linear in linears if linear not in packed]
    return packed | {linear: _layer(linear.weight.detach(), linear.bias) for linear in alone}


def _layer(weight: Tensor, bias: Tensor | None) -> nn.Module:
    found = compiled.library()
    if found is not None and compiled.can_pack(weight, bias):
        return compiled.CompiledLinear(found, weight, bias)
    return PackedLinear(weight, bias)


def _obstacle(size: int, linears: list[nn.Linear]) -> str | None:
    if not linears:
        return "none that can be packed"
    free = available_ram()
    if size > MEMORY_SHARE * free:
        return f"a second copy of {size >> 20} MiB would leave too little of the {free >> 20} MiB that are free"
    left = {
        each.weight.dtype for each in linears if not (compiled.can_pack(each.weight, each.bias) and compiled.library())
    }
    if not all(map(is_usable, left)):
        return "this torch or CPU has no packed operators"
    return None


def _difference(model: nn.Module, expected: Tensor) -> str | None:
    loaded: Any = model
    try:
        off = off_by(expected, _logits(model))
    except (AttributeError, RuntimeError) as error:
        return str(error).splitlines()[0]
    # Other kernels add up in another order: that is as far off as a batch may be.  Some models widen their logits.
    return None if off <= TOLERANCE[loaded.dtype] else f"packed, its logits are off by {off:.2g} of their spread"


def _logits(model: nn.Module) -> Tensor:
    config: Any = model.config
    token_ids = torch.tensor([probe_tokens(config.get_text_config().vocab_size, NUM_PROBES, 0)])
    return model(input_ids=token_ids, use_cache=False).logits[0].float()
