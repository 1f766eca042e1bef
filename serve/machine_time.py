"""What a request costs: its share of the time in which this machine works.  The clock is given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

HOUR_S = 3600


@dataclass(slots=True)
class Share:
    """A request's part of the machine while it is served: ``weight`` sequences from the moment ``mark`` on."""

    weight: int
    mark: float


class MachineTime:
    """Splits the time in which there is any work among the requests that are there.  Belongs to the event loop.

    At each moment, a request has the part of the machine that its sequences are of all sequences.  So the shares of all
    requests add up to the time in which there was at least one, however they overlap.

    Args:
        usd_per_hour: The machine's price; None: unknown.
        clock: Seconds.
    """

    def __init__(self, usd_per_hour: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._usd_per_hour = usd_per_hour
        self._clock = clock
        self._num_sequences = 0
        self._each_s = 0.0  # what a sequence that was always there has had of the machine
        self._updated_at = clock()

    def begin(self, num_sequences: int) -> Share:
        """A request begins; :meth:`end` ends it."""
        self._advance()
        self._num_sequences += num_sequences
        return Share(num_sequences, self._each_s)

    def end(self, share: Share) -> float:
        """A request has ended: the machine's seconds that were its own."""
        self._advance()
        self._num_sequences -= share.weight
        return share.weight * (self._each_s - share.mark)

    def cost_usd(self, machine_s: float) -> float | None:
        """The price of the machine's seconds; None where it is unknown."""
        return None if self._usd_per_hour is None else round(machine_s * self._usd_per_hour / HOUR_S, 9)

    def _advance(self) -> None:
        now = self._clock()
        if self._num_sequences:
            self._each_s += (now - self._updated_at) / self._num_sequences
        self._updated_at = now
