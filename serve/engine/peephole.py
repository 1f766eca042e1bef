"""Rewrites a recorded graph: what models write as many small operators becomes few.

A pattern is found by what is computed, not by a model's names.  Rotary embedding gives the same bits as before, a norm
the same but for how float32 sums are rounded; the whole program is compared with the model afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from serve.engine.program import Graph, Node, Size, Value, needed, used
from serve.engine.rows import ROTARY_STEP, Rows

FEW_ROWS = 8
"""Up to so many a norm takes as long as its calls do; beyond, as its arithmetic."""


def simplified(graph: Graph, rows: Rows | None = None) -> Graph:
    """The same computation in fewer operators: those of ``rows``, where they are given and can do it."""
    nodes = _Norms(graph, rows).rewritten()
    nodes = _Gates(replace(graph, nodes=nodes), rows).rewritten()
    nodes = _Rotations(replace(graph, nodes=nodes), rows).rewritten()
    return replace(graph, nodes=needed(nodes, graph.result))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight``, the quotient rounded to ``x``'s type first."""
    size = x.shape[-1]
    if x.numel() <= FEW_ROWS * size:
        # Next to its own negative a row has the mean 0, and its mean square as variance: all in one kernel.
        return torch.layer_norm(torch.cat((x, x.neg()), -1), (2 * size,), None, None, eps)[..., :size] * weight
    rows = x.reshape(-1, size)
    wide = rows.float() if x.dtype != torch.float32 else rows.clone()
    roots = torch.addmm(_constant(eps), wide * wide, _constant(1 / size, size)).rsqrt_()
    return wide.mul_(roots).to(x.dtype).mul_(weight).view(x.shape)


@cache
def _constant(value: float, size: int = 0) -> Tensor:
    return torch.full((size, 1) if size else (), value)


def signed(sines: Tensor) -> Tensor:
    """The first half negated, so that :func:`rotated` need not negate half of its input."""
    half = sines.shape[-1] // 2
    return torch.cat((sines[..., :half].neg(), sines[..., half:]), -1)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of ``[..., head_dim]``, halves against each other; ``sines`` as :func:`signed` gives them."""
    return x.roll(x.shape[-1] // 2, -1).mul_(sines).add_(x * cosines)


def rotated_pair(x: Tensor, cosines: Tensor, sines: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[1, sum(sizes), n, head_dim]`` at once, and apart."""
    whole = rotated(x, cosines, sines)
    return whole.narrow(1, 0, sizes[0]), whole.narrow(1, sizes[0], sizes[1])


class _Rewriter:
    """Knows who makes and who reads each value."""

    def __init__(self, graph: Graph, rows: Rows | None) -> None:
        self._graph, self._rows = graph, rows
        self._maker = {value: node for node in graph.nodes for value in node.results}
        self._readers: dict[Value, list[Node]] = {}
        for node in graph.nodes:
            for value in used(node):
                self._readers.setdefault(value, []).append(node)

    def made(self, value: Any, function: Callable[..., Any]) -> Node | None:
        """The node that computes ``value``, if it is such a one."""
        node = self._maker.get(value) if isinstance(value, Value) else None
        return node if node is not None and node.function is function and not node.options else None

    def only_reader(self, node: Node, function: Callable[..., Any]) -> Node | None:
        """The one node that reads the result, if it is such a one."""
        value = node.results[0]
        readers = self._readers.get(value, [])
        if len(readers) != 1 or value == self._graph.result or readers[0].options:
            return None
        return readers[0] if readers[0].function is function else None

    def may_be_contiguous(self, node: Node) -> bool:
        """Whether nobody counts on its result to lie otherwise in memory."""
        readers = self._readers.get(node.results[0], [])
        return node.is_contiguous or not any(reader.function is torch.as_strided for reader in readers)


class _Norms(_Rewriter):
    """``weight * (x.float() * rsqrt(mean(x.float() ** 2) + eps)).to(x.dtype)``, and the same in one type."""

    def rewritten(self) -> list[Node]:
        """All nodes; those that a norm no longer needs are still among them."""
        found = dict(filter(None, map(self._norm, self._graph.nodes)))
        return [found.get(id(node), node) for node in self._graph.nodes]

    def _norm(self, root: Node) -> tuple[int, Node] | None:
        """The last node of the norm around ``root``, by id, and what takes its place."""
        if root.function is not torch.rsqrt:
            return None
        total = self.made(root.arguments[0], torch.add)
        mean = self.made(total.arguments[0], torch.mean) if total else None
        square = self.made(mean.arguments[0], torch.pow) if mean else None
        scaled = self.only_reader(root, torch.mul)
        if total is None or mean is None or square is None or scaled is None:
            return None
        x, eps = square.arguments[0], total.arguments[1]
        if square.arguments[1] != 2 or mean.arguments[1:] != ((-1,), True) or not isinstance(eps, float):
            return None
        if set(scaled.arguments) != {x, root.results[0]}:
            return None
        widened = self.made(x, Tensor.to)
        if widened is not None:
            source = self._maker.get(widened.arguments[0])
            narrowed = self.only_reader(scaled, Tensor.to)
            if source is None or narrowed is None or narrowed.dtype != source.dtype:
                return None
            x, scaled = widened.arguments[0], narrowed
        return self._weighted(scaled, x, eps)

    def _weighted(self, scaled: Node, x: Value, eps: float) -> tuple[int, Node] | None:
        last = self.only_reader(scaled, torch.mul)
        if last is None or last.dtype != scaled.dtype or not self.may_be_contiguous(last):
            return None
        weights = [argument for argument in last.arguments if isinstance(argument, Tensor)]
        if len(weights) != 1 or weights[0].dim() != 1:
            return None
        is_for_rows = last.dtype == weights[0].dtype == torch.bfloat16 and weights[0].is_contiguous()
        function = self._rows.rms_norm if self._rows and is_for_rows else rms_norm
        return id(last), replace(last, function=function, arguments=(x, weights[0], eps))


class _Gates(_Rewriter):
    """``silu(x) * y``."""

    def rewritten(self) -> list[Node]:
        """All nodes; those that a gate no longer needs are still among them."""
        if self._rows is None:
            return self._graph.nodes
        return [self._gate(node, self._rows) or node for node in self._graph.nodes]

    def _gate(self, last: Node, rows: Rows) -> Node | None:
        if last.function is not torch.mul or last.options or not self.may_be_contiguous(last):
            return None
        for x, y in (last.arguments, last.arguments[::-1]):
            silu, other = self.made(x, functional.silu), self._maker.get(y) if isinstance(y, Value) else None
            if silu is None or other is None or self.only_reader(silu, torch.mul) is not last:
                continue
            if {last.dtype, silu.dtype, other.dtype} == {torch.bfloat16}:
                return replace(last, function=rows.silu_gate, arguments=(silu.arguments[0], y))
        return None


@dataclass(frozen=True, slots=True)
class _Rotation:
    """One embedding that was found."""

    last: Node
    x: Node
    """A view ``[1, num_heads, n, head_dim]``."""
    cosines: Value
    sines: Value


class _Rotations(_Rewriter):
    """``x * cos + cat((-x[half:], x[:half])) * sin``; two of them whose heads lie side by side become one."""

    def rewritten(self) -> list[Node]:
        """All nodes; those that an embedding no longer needs are still among them."""
        found = [rotation for node in self._graph.nodes if (rotation := self._rotation(node))]
        self._signed: dict[Value, Value] = {}
        self._numbers = count(1 + max(value.number for value in (*self._maker, *self._graph.inputs)))
        replaced: dict[int, list[Node]] = {}
        while found:
            first = found.pop(0)
            partner = found[0] if found and _adjacent(first, found[0]) else None
            replaced[id(first.last)] = self._nodes(first, partner)
            if partner is not None:
                replaced[id(found.pop(0).last)] = []
        return [each for node in self._graph.nodes for each in replaced.get(id(node), [node])]

    def _nodes(self, first: _Rotation, partner: _Rotation | None) -> list[Node]:
        nodes = list[Node]()
        alone, in_pairs = rotated, rotated_pair
        if self._rows and self._fits(first):
            alone, in_pairs = self._rows.rotated, self._rows.rotated_pair
        sines = self._signed.get(first.sines)
        if sines is None:
            sines = self._signed[first.sines] = self._new()
            nodes.append(Node(signed, (first.sines,), {}, [sines]))
        if partner is None:
            arguments = first.x.results[0], first.cosines, sines
            return [*nodes, replace(first.last, function=alone, arguments=arguments)]
        root, (one, heads, *rest), *place = first.x.arguments
        more = partner.x.arguments[1][1]
        both, whole = self._new(), (root, (one, heads + more, *rest), *place)
        results = [first.last.results[0], partner.last.results[0]]
        arguments = both, first.cosines, sines, (heads, more)
        return [
            *nodes,
            replace(first.x, arguments=whole, results=[both]),
            replace(first.last, function=in_pairs, arguments=arguments, results=results),
        ]

    def _fits(self, found: _Rotation) -> bool:
        """Whether there is a kernel that computes it."""
        sizes, strides = found.x.arguments[1:3]
        if len(sizes) != 4 or sizes[0] != 1 or strides[3] != 1 or sizes[3] % ROTARY_STEP:
            return False
        angles = [self.made(value, torch.as_strided) for value in (found.cosines, found.sines)]
        are_one_head = all(each is not None and each.arguments[1] == (1, 1, *sizes[2:]) for each in angles)
        dtypes = {node.dtype for node in (found.last, found.x, *angles) if node is not None}
        return are_one_head and dtypes == {torch.bfloat16}

    def _new(self) -> Value:
        """A value that nobody has."""
        return Value(next(self._numbers))

    def _rotation(self, last: Node) -> _Rotation | None:
        """The embedding that ends with ``last``."""
        if (
            last.function is not torch.add
            or last.options
            or len(last.arguments) != 2
            or not self.may_be_contiguous(last)
        ):
            return None
        for plain, turned in (last.arguments, last.arguments[::-1]):
            left, right = self.made(plain, torch.mul), self.made(turned, torch.mul)
            swapped = self.made(right.arguments[0], torch.cat) if right else None
            if left is None or right is None or swapped is None:
                continue
            x = self.made(left.arguments[0], torch.as_strided)
            cosines, sines = left.arguments[1], right.arguments[1]
            are_values = isinstance(cosines, Value) and isinstance(sines, Value)
            if x is not None and are_values and self._swaps(swapped, x):
                return _Rotation(last, x, cosines, sines)
        return None

    def _swaps(self, swapped: Node, x: Node) -> bool:
        """Whether it is the halves of ``x`` the other way round, one of them negated."""
        parts, *dim = swapped.arguments
        if dim != [-1] or len(parts) != 2:
            return False
        negated = self.made(parts[0], torch.neg)
        second = self.made(negated.arguments[0], torch.as_strided) if negated else None
        first = self.made(parts[1], torch.as_strided)
        if first is None or second is None:
            return False
        (root, sizes, strides, *offset), size = x.arguments, x.arguments[1][-1]
        begin = offset[0] if offset else 0
        if not isinstance(size, int) or size % 2:
            return False
        halves = (*sizes[:-1], size // 2)
        return all(
            half.arguments[:3] == (root, halves, strides) and _offset(half) == _moved(begin, by)
            for half, by in ((first, 0), (second, size // 2))
        )


def _offset(view: Node) -> int | Size:
    return view.arguments[3] if len(view.arguments) > 3 else 0


def _moved(offset: int | Size, by: int) -> int | Size:
    return offset + by if isinstance(offset, int) else replace(offset, constant=offset.constant + by)


def _adjacent(a: _Rotation, b: _Rotation) -> bool:
    """Whether the heads of ``b`` follow those of ``a``, in the same rows of the same tensor."""
    if (a.cosines, a.sines) != (b.cosines, b.sines) or a.x.arguments[0] is not b.x.arguments[0]:
        return False
    sizes, strides = a.x.arguments[1:3]
    heads, step = sizes[1] if len(sizes) == 4 else None, strides[1]
    if not isinstance(heads, int) or not isinstance(step, int) or strides != b.x.arguments[2]:
        return False
    others = b.x.arguments[1]
    alike = (others[0], *others[2:]) == (sizes[0], *sizes[2:]) and isinstance(others[1], int)
    return alike and _offset(b.x) == _moved(_offset(a.x), heads * step)
