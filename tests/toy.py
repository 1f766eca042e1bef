"""Functions in the place of a model, recorded as a step is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from serve.engine import builder, program
from serve.engine.recorder import Recording, record


class Toy(nn.Module):
    """No attention: only what :func:`record` asks of a model, and a function as its forward pass."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = forward
        self.config = self

    def get_text_config(self) -> Toy:
        return self

    _attn_implementation = "eager"

    def set_attn_implementation(self, name: str) -> None:
        self._attn_implementation = name


def inputs(columns: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Token ids below 6, and places among them."""
    generator = torch.Generator().manual_seed(columns)
    ids = torch.randint(0, 6, (1, columns), generator=generator)
    return ids, torch.randint(0, columns, (wanted,), generator=generator)


def recorded(forward: Callable[..., Tensor], columns: int, wanted: int) -> Recording:
    with torch.inference_mode():
        return record(Toy(forward), inputs(columns, wanted), forward)


def graph_of(forward: Callable[..., Tensor]) -> program.Graph:
    """Of a function of token ids and wanted places."""
    return builder.build(recorded(forward, 4, 2), recorded(forward, 5, 2), recorded(forward, 4, 3))


def of_ids(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that wants all there is."""
    return lambda ids, wanted: forward(ids)
