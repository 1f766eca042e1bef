"""What a machine that scales to zero costs, and who waits for its boot.  Plain arithmetic.

Requests arrive independently of each other (a Poisson process) at ``rate`` a second; each takes ``service_s``; the
machine stays up for ``idle_s`` after the last one, and takes ``cold_s`` to boot, during which it is paid for.  One
replica that is not full.  A simulation checks all of it (``tests/unit/test_plan_economics.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

HOURS_PER_MONTH = 730
LARGEST_EXPONENT = 700.0
"""Beyond, a float overflows; the machine never sleeps anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rhythm:
    """How one replica is used: requests a second, and seconds of a request, of idleness, of a boot."""

    rate: float
    service_s: float
    idle_s: float
    cold_s: float

    @property
    def up_s(self) -> float:
        """Mean seconds from the start of a boot until the machine sleeps again; infinite: it never does."""
        exponent = self.rate * (self.service_s + self.idle_s)
        if exponent > LARGEST_EXPONENT:
            return math.inf
        return self.cold_s + math.expm1(exponent) / self.rate

    @property
    def up_share(self) -> float:
        """Share of all time that is paid for."""
        return 1 / (1 + 1 / (self.rate * self.up_s)) if self.up_s < math.inf else 1.0

    @property
    def boot_share(self) -> float:
        """Share of requests that come while the machine sleeps or boots, and wait."""
        return (1 + self.rate * self.cold_s) / (1 + self.rate * self.up_s)

    @property
    def mean_wait_s(self) -> float:
        """Mean seconds that such a request waits: the first one for the whole boot, later ones for the rest of it."""
        during = self.rate * self.cold_s
        return self.cold_s * (1 + during / 2) / (1 + during)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Dollars of one deployment under one load, and what its users see of its boots."""

    usd_per_hour: float
    usd_per_million_output_tokens: float
    usd_per_million_tokens: float
    up_share: float
    boot_wait_share: float
    mean_boot_wait_s: float
    num_replicas: int

    @property
    def usd_per_month(self) -> float:
        """Of 730 hours."""
        return self.usd_per_hour * HOURS_PER_MONTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What users do: requests an hour, tokens of each prompt and of each answer."""

    per_hour: float
    prompt_tokens: int
    output_tokens: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.per_hour / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one machine does with a request, and how it is paid.

    ``idle_s`` None: it never sleeps.  ``slots`` requests run at once; more need another replica.
    """

    usd_per_hour_up: float
    service_s: float
    cold_s: float
    idle_s: float | None
    slots: int


def cost(load: Load, terms: Terms) -> Cost:
    """What a load costs on a machine.

    Requests that exceed the slots of one replica are spread over more, each with its share of them.
    """
    num_replicas = max(1, math.ceil(load.rate * terms.service_s / terms.slots))
    up_share, boot_share, wait_s = 1.0, 0.0, 0.0
    if terms.idle_s is not None:
        rhythm = Rhythm(
            rate=load.rate / num_replicas, service_s=terms.service_s, idle_s=terms.idle_s, cold_s=terms.cold_s
        )
        up_share, boot_share, wait_s = rhythm.up_share, rhythm.boot_share, rhythm.mean_wait_s
    per_hour = terms.usd_per_hour_up * up_share * num_replicas
    return Cost(
        usd_per_hour=per_hour,
        usd_per_million_output_tokens=per_hour / (load.per_hour * load.output_tokens) * 1e6,
        usd_per_million_tokens=per_hour / (load.per_hour * (load.prompt_tokens + load.output_tokens)) * 1e6,
        up_share=up_share,
        boot_wait_share=boot_share,
        mean_boot_wait_s=wait_s,
        num_replicas=num_replicas,
    )


def break_even(terms: Terms, always_on_usd_per_hour: float) -> float | None:
    """Requests an hour from which a machine that never sleeps, at that price, is cheaper than this one.

    None: never, because this one costs less even when it is up all the time.
    """
    if terms.idle_s is None or terms.usd_per_hour_up <= always_on_usd_per_hour:
        return None
    wanted = always_on_usd_per_hour / terms.usd_per_hour_up
    low, high = 0.0, 1.0
    while _up_share(terms, high) < wanted:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _up_share(terms, middle) < wanted else (low, middle)
    return high


def _up_share(terms: Terms, per_hour: float) -> float:
    idle_s = terms.idle_s or 0.0
    return Rhythm(rate=per_hour / 3600, service_s=terms.service_s, idle_s=idle_s, cold_s=terms.cold_s).up_share
