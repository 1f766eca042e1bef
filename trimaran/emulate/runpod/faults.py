"""Faults on order: what a control plane does on bad days."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve.errors import ConfigError

ROUTES = (
    *("run", "runsync", "status", "stream", "cancel", "health", "openai"),
    *("job-take", "job-stop", "job-stream", "job-done", "ping"),
)
_FORM = re.compile(r"(?P<route>[a-z-]+):(?:(?P<status>[1-5]\d\d)|(?P<delay>\d+(?:\.\d+)?)s)(?:x(?P<times>\d+))?")


@dataclass(slots=True)
class Fault:
    """Answer ``route`` with ``status``, or ``delay_s`` late, for the next ``times`` requests (None: for ever)."""

    route: str
    status: int | None = None
    delay_s: float = 0.0
    times: int | None = None


def parse_fault(text: str) -> Fault:
    """Read ``ROUTE:STATUS`` or ``ROUTE:SECONDSs``, each with an optional ``xTIMES``: ``job-stream:500x4``.

    Raises:
        ConfigError: it has another form.
    """
    found = _FORM.fullmatch(text)
    if found is None or found["route"] not in ROUTES:
        raise ConfigError(
            f"{text!r} is no fault: write ROUTE:STATUS or ROUTE:SECONDSs, with xTIMES if you like, such as "
            f"job-stream:500x4 or job-done:0.2s; routes are {', '.join(ROUTES)}"
        )
    return Fault(
        route=found["route"],
        status=int(found["status"]) if found["status"] else None,
        delay_s=float(found["delay"] or 0),
        times=int(found["times"]) if found["times"] else None,
    )


class Faults:
    """The faults that are still to happen."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._faults = list(faults)

    def add(self, fault: Fault) -> None:
        """Order one more."""
        self._faults.append(fault)

    def clear(self) -> None:
        """No more faults."""
        self._faults.clear()

    def next(self, route: str) -> Fault | None:
        """The fault that this request gets."""
        for fault in self._faults:
            if fault.route == route and fault.times != 0:
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None
