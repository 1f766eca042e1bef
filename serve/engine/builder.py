"""Recordings of a forward pass become one graph for batches of every size.

They differ in how many columns they had and how many rows of logits were wanted, which tells what of their numbers
depends on these.  Views are taken in one step from the tensor that they show a part of, what was computed before is not
computed again, and what depends on weights alone is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import mul
from typing import Any

import torch
from torch import Tensor

from serve.engine import attention, compiled, linear
from serve.engine.program import Graph, Node, Size, Value, leaves, needed
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
    """Recordings side by side become one graph.  The first one's tensors stand for those of all."""

    sizes: list[tuple[int, int]]
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

    def same(self, each: tuple[Any, ...]) -> Any:
        """One argument, as the recordings have it."""
        first = each[0]
        if isinstance(first, Tensor):
            return self.tensor(each)
        if isinstance(first, (list, tuple)):
            return tuple(self.same(items) for items in zip(*each, strict=True))
        if all(other == first for other in each) or (isinstance(first, float) and math.isnan(first)):
            return first
        if all(type(other) is int for other in each):
            return self.size(each)
        raise NotReplayable(f"an argument changes with the rows: {', '.join(map(repr, each))}")

    def size(self, each: tuple[int, ...]) -> int | Size:
        """The number that depends on columns and wanted rows in this way."""
        first, *others = each
        if all(other == first for other in others):
            return first
        factors = [0, 0]
        for other, sizes in zip(others, self.sizes[1:], strict=True):
            changed = next(axis for axis in (0, 1) if sizes[axis] != self.sizes[0][axis])
            factors[changed], rest = divmod(other - first, sizes[changed] - self.sizes[0][changed])
            if rest:
                raise NotReplayable("a size is no multiple of the rows")
        constant = first - sum(map(mul, factors, self.sizes[0]))
        return Size((factors[0], factors[1]), constant)

    def tensor(self, each: tuple[Tensor, ...]) -> Value | Tensor:
        first = each[0]
        found = self.known.get(id(first))
        if isinstance(found, View):
            return self.emit(torch.as_strided, (found.root, *found.geometry), {}, first)
        if found is not None:
            return found
        if not all(_are_equal(first, other) for other in each[1:]):
            raise NotReplayable("a tensor of its own changes with the rows")
        self.known[id(first)] = first
        return first

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

    def add(self, calls: tuple[Call, ...]) -> None:
        """One call, of all recordings."""
        call = calls[0]
        results = call.results
        for other in calls[1:]:
            if (other.function, other.layer, len(other.results)) != (call.function, call.layer, len(results)):
                raise NotReplayable("what it calls changes with the rows")
        if all(id(result) in self.known for result in results):
            return  # nothing was to be done, and the argument itself came back
        if call.layer is None and self.is_view(calls):
            return
        arguments = self.same(tuple(each.arguments for each in calls))
        options = {name: self.same(tuple(each.options[name] for each in calls)) for name in call.options}
        first = results[0]
        if call.layer is not None:
            value = self.new(first)
            self.attended.add(value)
            self.nodes.append(Node(_attention, (call.layer, *arguments), options, [value], first.dtype, writes=True))
        elif _is_constant((*arguments, *options.values())) and sum(map(_size, results)) <= FOLDED_BYTES:
            self.known |= {id(result): result for result in results}
        elif any(result.storage_offset() for result in results if result.layout is torch.strided):
            raise NotReplayable(f"a result begins inside of another ({call.function})")
        elif call.function is PACKED:
            self.known[id(first)] = self.emit(linear.layer_of(arguments[1]).forward, arguments[:1], {}, first)
        elif call.function is compiled.operator():
            self.known[id(first)] = self.emit(compiled.layer_of(arguments[1]).compute, arguments[:1], {}, first)
        elif len(results) == 1:
            self.known[id(first)] = self.emit(DIRECT.get(call.function, call.function), arguments, options, first)
        else:
            values = [self.new(each) for each in results]
            self.nodes.append(Node(call.function, arguments, options, values, first.dtype))

    def is_view(self, calls: tuple[Call, ...]) -> bool:
        """Whether the results are parts of the first argument; then they are remembered as such."""
        sources = tuple(_first_tensor(call) for call in calls)
        source, results = sources[0], calls[0].results
        if source is None or source.layout is not torch.strided:
            return False
        if not all(_storage(result) == _storage(source) and result.dtype == source.dtype for result in results):
            return False
        found = self.known.get(id(source))
        root = found.root if isinstance(found, View) else self.same(sources)
        for each in zip(*(call.results for call in calls), strict=True):
            geometry: tuple[Any, ...] = self.same(tuple(map(_geometry, each)))
            if geometry[-1] == 0:
                geometry = geometry[:-1]
            elif root in self.attended:
                raise NotReplayable("it takes attention's result apart")
            is_fixed = isinstance(root, Tensor) and _is_constant(geometry)
            self.known[id(each[0])] = each[0] if is_fixed else View(root, geometry)
        return True


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _first_tensor(call: Call) -> Tensor | None:
    return next((leaf for leaf in leaves(call.arguments) if isinstance(leaf, Tensor)), None)


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _attention(layer: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return attention.slot_attention(layer, query, key, value, None, **options)[0].contiguous()


def _storage(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def _size(tensor: Tensor) -> int:
    return tensor.nbytes if tensor.layout is torch.strided else FOLDED_BYTES + 1


def _is_constant(arguments: Any) -> bool:
    return not any(isinstance(leaf, (Value, Size)) for leaf in leaves(arguments))


def _key(arguments: Any) -> Any:
    if isinstance(arguments, (list, tuple)):
        return tuple(_key(item) for item in arguments)  # pyright: ignore[reportUnknownVariableType]
    # 1, 1.0 and True are equal, but not the same to an operator.
    return id(arguments) if isinstance(arguments, Tensor) else (type(arguments), arguments)


def build(*recordings: Recording) -> Graph:
    """What recordings have in common.  Each but the first differs from it in one of its two sizes, each in another.

    Raises:
        NotReplayable: they do different things.
    """
    builder = _Builder([recording.sizes for recording in recordings])
    inputs = [builder.new(tensor) for tensor in recordings[0].inputs]
    if len({len(recording.calls) for recording in recordings}) != 1:
        raise NotReplayable("what it calls changes with the rows")
    for calls in zip(*(recording.calls for recording in recordings), strict=True):
        builder.add(calls)
    result = builder.tensor(tuple(recording.result for recording in recordings))
    if not isinstance(result, Value):
        raise NotReplayable("its result does not depend on its input")
    return Graph(needed(builder.nodes, result), inputs, result)
