"""What a replica and the database of limits say to each other.  Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

LEASE_S = 15.0
"""After so long without a sign of life, a replica's running requests no longer count.  Three renewals fit in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one replica tells of a caller, and wants for it.

    ``requests`` were let in uncounted (below zero: counted, but never let in); ``known_*`` is what this replica knows
    of today, for a caller of whom the database knows nothing.
    """

    caller: str
    num_wanted: int
    num_running: int
    requests: int
    tokens: int
    tokens_today: int
    usd_today: float
    known_tokens: int
    known_usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Where a caller stands with all replicas, ``num_granted`` of the wanted requests being let in."""

    caller: str
    num_granted: int
    requests: float | None
    tokens: float | None
    tokens_today: int
    usd_today: float
    num_elsewhere: int


class LimitStore(Protocol):
    """The database.  Each method raises whatever its driver does."""

    async def open(self) -> None:
        """Connect, unless it is connected."""
        ...

    async def beat(self) -> int:
        """Say that this replica lives; returns how many do."""
        ...

    async def exchange(self, asks: Sequence[Ask]) -> Sequence[Answer]:
        """Count and grant in one step, for each caller alone; an answer for each ask."""
        ...

    async def leave(self) -> None:
        """This replica ends; close."""
        ...

    def drop(self) -> None:
        """Give up the connection, at once."""
        ...
