"""A forward pass as one Python function: torch's operators one after the other, without the model's modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that the program computes, or is given."""

    number: int


@dataclass(frozen=True, slots=True)
class Size:
    """``factors[0] * num_columns + factors[1] * num_wanted + constant``: a number that depends on the batch."""

    factors: tuple[int, int]
    constant: int = 0


@dataclass(slots=True)
class Node:
    """One line: ``results = function(*arguments, **options)``."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: list[Value]
    dtype: torch.dtype | None = None
    is_contiguous: bool = False
    """Both of the first result."""
    writes: bool = False
    """Whether it does more than give results."""


@dataclass(slots=True)
class Graph:
    """Nodes in the order in which they run."""

    nodes: list[Node]
    inputs: list[Value]
    result: Value


def source(graph: Graph) -> str:
    """The text of :func:`compiled`."""
    return _Writer(graph).source()


def compiled(graph: Graph) -> Callable[..., Tensor]:
    """The function of a graph: ``(num_columns, num_wanted, *inputs)`` to its result."""
    return _Writer(graph).function()


class _Writer:
    """Writes a graph as Python source: numbers, and names of its own for everything else.

    No text of a model, a file or a request gets into it.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._names: dict[str, Any] = {}
        self._by_id: dict[int, str] = {}

    def function(self) -> Callable[..., Tensor]:
        exec(compile(self.source(), "<recorded forward pass>", "exec"), self._names)  # noqa: S102 - see the class
        return self._names["run"]

    def source(self) -> str:
        nodes, result = self._graph.nodes, self._graph.result
        last = {value: number for number, node in enumerate(nodes) for value in used(node)}
        lines = [f"def run(n, k, {', '.join(map(self._text, self._graph.inputs))}):"]
        for number, node in enumerate(nodes):
            targets = ", ".join(self._text(value) for value in node.results)
            lines.append(f" {targets} = {self._call(node)}")
            dead = [value for value in {*used(node), *node.results} if last.get(value, number) == number]
            if names := [self._text(value) for value in dead if value != result]:
                lines.append(f" del {', '.join(names)}")
        return "\n".join([*lines, f" return {self._text(result)}"])

    def _call(self, node: Node) -> str:
        parts = [self._text(argument) for argument in node.arguments]
        for name, option in node.options.items():
            if not name.isidentifier():
                raise ValueError("an option has a name that is none")
            parts.append(f"{name}={self._text(option)}")
        return f"{self._name(node.function)}({', '.join(parts)})"

    def _text(self, argument: Any) -> str:
        match argument:
            case Value():
                return f"v{argument.number}"
            case Size():
                terms = [f"{factor}*{name}" for factor, name in zip(argument.factors, "nk", strict=True) if factor]
                return "+".join([*terms, str(argument.constant)] if argument.constant else terms)
            case tuple():
                items = [self._text(item) for item in argument]  # pyright: ignore[reportUnknownVariableType]
                return f"({', '.join(items)}{',' * (len(items) == 1)})"
            case _ if argument is None or type(argument) in {bool, int}:
                return repr(argument)
            case _ if type(argument) is float and math.isfinite(argument):
                return repr(argument)
            case _:
                return self._name(argument)

    def _name(self, constant: Any) -> str:
        name = self._by_id.get(id(constant))
        if name is None:
            name = self._by_id[id(constant)] = f"c{len(self._by_id)}"
            self._names[name] = constant
        return name


def needed(nodes: list[Node], result: Value) -> list[Node]:
    """Those that the result depends on, and those that write."""
    wanted, kept = {result}, list[Node]()
    for node in reversed(nodes):
        if node.writes or not wanted.isdisjoint(node.results):
            kept.append(node)
            wanted |= used(node)
    return kept[::-1]


def used(node: Node) -> set[Value]:
    """What a node reads."""
    return {leaf for leaf in leaves((*node.arguments, *node.options.values())) if isinstance(leaf, Value)}


def leaves(arguments: Any) -> Iterator[Any]:
    """What nested lists and tuples hold."""
    if isinstance(arguments, (list, tuple)):
        for item in arguments:  # pyright: ignore[reportUnknownVariableType]
            yield from leaves(item)
    else:
        yield arguments
