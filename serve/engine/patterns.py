"""Which keys a query sees: everything before it, a sliding window, or its own chunk of the context.

In every pattern a query at position ``q`` sees the keys ``first(q)`` to ``q``, so one number says it all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class Kind(StrEnum):
    """transformers' own names of the layer types."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"
    CHUNKED = "chunked_attention"


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a layer shows.  ``size`` is the window's or the chunk's length in tokens, 0 for full attention."""

    kind: Kind = Kind.FULL
    size: int = 0

    def first(self, position: int) -> int:
        """The first key that the query at ``position`` sees."""
        match self.kind:
            case Kind.FULL:
                return 0
            case Kind.SLIDING:
                return max(0, position - self.size + 1)
            case Kind.CHUNKED:
                return position // self.size * self.size

    def first_of(self, positions: Tensor) -> Tensor:
        """:meth:`first` of every element."""
        match self.kind:
            case Kind.FULL:
                return torch.zeros_like(positions)
            case Kind.SLIDING:
                return (positions - self.size + 1).clamp_(min=0)
            case Kind.CHUNKED:
                return positions // self.size * self.size

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """``[num_queries, num_keys]``, True where a key is seen; both are positions, of one dimension."""
        columns = keys[None, :]
        seen = columns <= queries[:, None]
        return seen if self.kind is Kind.FULL else seen & (columns >= self.first_of(queries)[:, None])


FULL = Pattern()
