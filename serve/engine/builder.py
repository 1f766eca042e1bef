"""Two recordings of a forward pass become one graph for every number of rows.

They differ in how many rows they had, which tells what of the numbers in them grows with the rows.  Views are taken in
one step from the tensor that they show a part of, what was computed before is not computed again, and what depends on
weights alone is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from serve.engine import attention, linear
from serve.engine.program import Graph, Node, Rows, Value, needed
from serve.engine.recorder import Call, NotReplayable, Recording

aten: Any = torch.ops.aten

DIRECT: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.cat.default: torch.cat,
    aten.cos.default: torch.cos,
    aten.div.Tensor: torch.div,
    aten.embedding.default: torch.embedding,
    aten.gelu.default: torch.nn.functional.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.rsqrt.default: torch.rsqrt,
    aten.silu.default: torch.nn.functional.silu,
    aten.sin.default: torch.sin,
    aten.sub.Tensor: torch.sub,
    aten.tanh.default: torch.tanh,
    aten.to.dtype: Tensor.to,
}
"""The same operators as torch offers them to Python, which costs a third of calling them by their schema."""

FOLDED_BYTES = 1 << 20
"""Results that depend on weights alone are kept up to this size."""

PACKED: Any = torch.ops.mkldnn._linear_pointwise.default


@dataclass(frozen=True, slots=True)
class View:
    """A part of ``root``: sizes, strides and offset in elements."""

    root: Value | Tensor
    geometry: tuple[Any, ...]


@dataclass(slots=True)
class _Builder:
    """Two recordings side by side become one graph."""

    rows: tuple[int, int]
    nodes: list[Node] = field(default_factory=list[Node])
    known: dict[int, Any] = field(default_factory=dict[int, Any])
    """By the id of the first recording's tensor: its :class:`Value`, :class:`View` or constant."""
    seen: dict[Any, Value] = field(default_factory=dict[Any, Value])
    """What was computed, by function and arguments."""
    attended: set[Any] = field(default_factory=set[Any])
    """The results of attention: how they lie in memory is not recorded."""
    count: int = 0

    def new(self, tensor: Tensor) -> Value:
        value = Value(self.count)
        self.count += 1
        self.known[id(tensor)] = value
        return value

    def pair(self, a: Any, b: Any) -> Any:
        """One argument, as both recordings have it."""
        if isinstance(a, Tensor):
            return self.tensor(a, b)
        if isinstance(a, (list, tuple)):
            items: list[Any] = [*a]  # pyright: ignore[reportUnknownVariableType]
            return tuple(self.pair(x, y) for x, y in zip(items, b, strict=True))
        if a == b or (isinstance(a, float) and math.isnan(a)):
            return a
        if isinstance(a, int) and isinstance(b, int):
            return self.linear(a, b)
        raise NotReplayable(f"an argument changes with the rows: {a!r} and {b!r}")

    def linear(self, a: int, b: int) -> int | Rows:
        if a == b:
            return a
        factor, rest = divmod(b - a, self.rows[1] - self.rows[0])
        if rest:
            raise NotReplayable("a size is no multiple of the rows")
        return Rows(factor, a - factor * self.rows[0])

    def tensor(self, a: Tensor, b: Tensor) -> Value | Tensor:
        found = self.known.get(id(a))
        if isinstance(found, View):
            return self.emit(torch.as_strided, (found.root, *found.geometry), {}, a)
        if found is not None:
            return found
        if a is not b and not (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)):
            raise NotReplayable("a tensor of its own changes with the rows")
        self.known[id(a)] = a
        return a

    def emit(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], like: Tensor
    ) -> Value:
        """A node whose result is ``like`` the recorded one, unless the same was computed before."""
        key = (function, _key(arguments), _key(tuple(options.items())))
        found = self.seen.get(key)
        if found is None:
            found = self.seen[key] = Value(self.count)
            self.count += 1
            self.nodes.append(Node(function, arguments, options, [found], like.dtype, like.is_contiguous()))
        return found

    def add(self, a: Call, b: Call) -> None:
        """One call, of both recordings."""
        if a.function is not b.function or a.layer is not b.layer or len(a.results) != len(b.results):
            raise NotReplayable("what it calls changes with the rows")
        if all(id(result) in self.known for result in a.results):
            return  # nothing was to be done, and the argument itself came back
        if a.layer is None and self.is_view(a, b):
            return
        arguments, options = (
            self.pair(a.arguments, b.arguments),
            {name: self.pair(option, b.options[name]) for name, option in a.options.items()},
        )
        if a.layer is not None:
            value = self.new(a.results[0])
            self.attended.add(value)
            self.nodes.append(
                Node(_attention, (a.layer, *arguments), options, [value], a.results[0].dtype, writes=True)
            )
            return
        if _is_constant((arguments, options)) and sum(map(_size, a.results)) <= FOLDED_BYTES:
            self.known |= {id(result): result for result in a.results}
            return
        if any(result.storage_offset() for result in a.results if result.layout is torch.strided):
            raise NotReplayable(f"a result begins inside of another ({a.function})")
        first = a.results[0]
        if a.function is PACKED:
            self.known[id(first)] = self.emit(linear.layer_of(arguments[1]).forward, arguments[:1], {}, first)
        elif len(a.results) == 1:
            self.known[id(first)] = self.emit(DIRECT.get(a.function, a.function), arguments, options, first)
        else:
            self.nodes.append(
                Node(a.function, arguments, options, [self.new(result) for result in a.results], first.dtype)
            )

    def is_view(self, a: Call, b: Call) -> bool:
        """Whether the results are parts of the first argument; then they are remembered as such."""
        source = next((leaf for leaf in _pytree.tree_leaves(a.arguments) if isinstance(leaf, Tensor)), None)
        other = next((leaf for leaf in _pytree.tree_leaves(b.arguments) if isinstance(leaf, Tensor)), None)
        if source is None or other is None or source.layout is not torch.strided:
            return False
        if not all(_storage(result) == _storage(source) and result.dtype == source.dtype for result in a.results):
            return False
        found = self.known.get(id(source))
        root = found.root if isinstance(found, View) else self.tensor(source, other)
        for x, y in zip(a.results, b.results, strict=True):
            geometry: tuple[Any, ...] = (self.pair(x.shape, y.shape), self.pair(x.stride(), y.stride()))
            if offset := self.linear(int(x.storage_offset()), int(y.storage_offset())):
                if root in self.attended:
                    raise NotReplayable("it takes attention's result apart")
                geometry = (*geometry, offset)
            is_fixed = isinstance(root, Tensor) and _is_constant(geometry)
            self.known[id(x)] = x if is_fixed else View(root, geometry)
        return True


def _attention(layer: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return attention.slot_attention(layer, query, key, value, None, **options)[0].contiguous()


def _storage(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def _size(tensor: Tensor) -> int:
    return tensor.nbytes if tensor.layout is torch.strided else FOLDED_BYTES + 1


def _is_constant(arguments: Any) -> bool:
    leaves = _pytree.tree_leaves(arguments)
    return not any(isinstance(leaf, (Value, Rows)) for leaf in leaves)


def _key(arguments: Any) -> Any:
    if isinstance(arguments, (list, tuple)):
        return tuple(_key(item) for item in arguments)  # pyright: ignore[reportUnknownVariableType]
    # 1, 1.0 and True are equal, but not the same to an operator.
    return id(arguments) if isinstance(arguments, Tensor) else (type(arguments), arguments)


def build(a: Recording, b: Recording) -> Graph:
    """What two recordings of different numbers of rows have in common.

    Raises:
        NotReplayable: they do different things.
    """
    builder = _Builder((a.num_rows, b.num_rows))
    inputs = [builder.new(tensor) for tensor in a.inputs]
    if len(a.calls) != len(b.calls):
        raise NotReplayable("what it calls changes with the rows")
    for x, y in zip(a.calls, b.calls, strict=True):
        builder.add(x, y)
    result = builder.tensor(a.result, b.result)
    if not isinstance(result, Value):
        raise NotReplayable("its result does not depend on its input")
    return Graph(needed(builder.nodes, result), inputs, result)
