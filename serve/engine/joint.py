"""Linear layers that are given the same input, computed as one: queries with keys and values, gates with their values.

Which ones those are is seen in a trial, not read from a model's names.  Each still decides by the tensor that it is
given: another one than its neighbours had is computed anew, so that joining can cost time but change no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

Compute = Callable[[Tensor], Tensor]


class Joint:
    """Computes all parts when the first is asked for, and forgets each as it is taken.

    Args:
        compute: ``[..., in_features]`` to the parts' results side by side.
        sizes: Of each part.
    """

    def __init__(self, compute: Compute, sizes: list[int]) -> None:
        self._compute, self._sizes = compute, sizes
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def take(self, index: int, x: Tensor) -> Tensor:
        """What part ``index`` makes of ``x``."""
        if x is not self._input or index not in self._parts:
            whole: Any = self._compute(x)  # torch leaves ``split`` untyped
            parts: tuple[Tensor, ...] = whole.split(self._sizes, -1)
            self._input, self._parts = x, dict(enumerate(parts))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None  # a step's tensors must not outlive it
        return part


class JointLinear(nn.Module):
    """One part, in the place of the layer that it was."""

    def __init__(self, linear: nn.Linear, joint: Joint, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._joint, self._index = joint, index

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return self._joint.take(self._index, x)


def neighbours(trial: Callable[[], object], linears: Iterable[nn.Linear]) -> list[list[nn.Linear]]:
    """Those of ``linears`` that get the same tensor one after the other in ``trial``, and can be one matrix."""
    given: list[tuple[nn.Linear, Tensor]] = []

    def note(linear: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(linear, nn.Linear) and arguments:
            given.append((linear, arguments[0]))

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        trial()
    finally:
        for hook in hooks:
            hook.remove()
    times = [linear for linear, _ in given]
    # ``given`` holds the tensors, so that no two of them have the same id.
    groups = [
        [linear for linear, _ in group]
        for _, group in groupby(given, lambda pair: (id(pair[1]), pair[0].weight.dtype, _bias(pair[0]) is None))
    ]
    return [group for group in groups if len(group) > 1 and all(times.count(linear) == 1 for linear in group)]


def side_by_side(group: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a group as one layer's."""
    biases = [bias.detach() for linear in group if (bias := _bias(linear)) is not None]
    return torch.cat([linear.weight.detach() for linear in group]), torch.cat(biases) if biases else None


def _bias(linear: nn.Linear) -> Tensor | None:
    return linear.bias  # which torch declares to be always there
