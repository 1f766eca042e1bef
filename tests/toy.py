"""Functions in the place of a model, recorded as a decode step is."""

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


def recorded(forward: Callable[..., Tensor], rows: int) -> Recording:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, 6, (1, rows), generator=generator)
    with torch.inference_mode():
        return record(Toy(forward), (ids,), forward)


def graph_of(forward: Callable[..., Tensor]) -> program.Graph:
    return builder.build(recorded(forward, 2), recorded(forward, 3))
