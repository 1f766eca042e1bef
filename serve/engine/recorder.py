"""Records what a model's forward pass asks of torch: every operator with its arguments, and each call of attention.

Only a pass that does the same for every input can be run again from its record.  One that looks at numbers in Python,
writes to tensors, or has results whose shape depends on numbers is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from serve.engine import attention
from serve.engine.survey import attention_of

RECORDED = "trimaran-recorded"

PASSED_ON = frozenset({"scaling", "softcap", "s_aux"})
"""The options of attention that :func:`serve.engine.attention.slot_attention` reads."""

READS = frozenset({"__bool__", "__contains__", "__float__", "__index__", "__int__", "item", "numpy", "tolist"})
"""Methods of a tensor that bring its numbers to Python."""

HARMLESS = frozenset({"aten::detach_", "aten::lift_fresh"})
"""What ``torch.tensor`` calls; torch declares the first as a change of its argument."""

DYNAMIC = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class NotReplayable(Exception):
    """The pass cannot be run from a record; the message says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator, or attention where ``layer`` is set, and what it gave."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: tuple[Tensor, ...]
    layer: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """All calls of one pass, in order.  ``sizes``: its columns, and the rows of logits that were wanted."""

    calls: tuple[Call, ...]
    inputs: tuple[Tensor, ...]
    result: Tensor
    sizes: tuple[int, int]


class _Reads(TorchFunctionMode):
    """Refuses what no operator shows."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in READS:
            raise NotReplayable(f"its forward pass looks at a tensor's numbers ({func.__name__})")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Collects every operator outside of attention."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.calls: list[Call] = []
        self._inside_attention = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        result: Any = func(*args, **options)
        if not self._inside_attention:
            _check(func, args, result)
            results: tuple[Any, ...] = (result,) if isinstance(result, Tensor) else (*result,)
            self.calls.append(Call(func, args, options, results))
        return result

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention as one call."""
        kept = {name: option for name, option in options.items() if name in PASSED_ON and option is not None}
        self._inside_attention = True
        try:
            # Its strides may differ from step to step, and what follows is recorded for one layout.
            out = attention.slot_attention(module, query, key, value, mask, **kept)[0].contiguous()
        finally:
            self._inside_attention = False
        self.calls.append(Call(attention.slot_attention, (query, key, value), kept, (out,), module))
        return out, None


def _check(func: Any, args: tuple[Any, ...], result: Any) -> None:
    if not isinstance(result, (Tensor, list, tuple)):
        raise NotReplayable(f"its forward pass looks at a tensor's numbers ({func})")
    obstacle = _obstacle(func)
    if obstacle is None:
        return
    if func is torch.ops.aten.index.Tensor:
        # An index of numbers gives as many rows as it has; a mask as many as are true.
        indices: list[Tensor | None] = args[1]
        if not any(index is not None and index.dtype in {torch.bool, torch.uint8} for index in indices):
            return
    if func is torch.ops.aten.dropout.default and not args[2]:
        return  # not in training
    raise NotReplayable(obstacle)


@cache
def _obstacle(func: Any) -> str | None:
    schema = func._schema
    if schema.is_mutable and schema.name not in HARMLESS:
        return f"its forward pass writes in place ({func})"
    if any(tag in func.tags for tag in DYNAMIC):
        return f"what its forward pass computes depends on a tensor's numbers ({func})"
    return None


def record(model: Any, inputs: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Recording:
    """``run(*inputs)``, which runs ``model``, and the record of it.

    Raises:
        NotReplayable: another pass may do something else.
    """
    import transformers  # noqa: PLC0415

    operators = _Operators()
    interface: Any = transformers.AttentionInterface
    interface.register(RECORDED, operators.attend)
    with attention_of(model, RECORDED), _Reads(), operators:
        result = run(*inputs)
    return Recording(tuple(operators.calls), inputs, result, (inputs[0].shape[-1], inputs[-1].shape[-1]))
