"""Render's instance types and regions, as its API's client and its documentation named them in October 2026."""

from __future__ import annotations

from dataclasses import dataclass

from serve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Plan:
    """One instance type: its name in a Blueprint, CPUs and memory.  Prices: ``trimaran/platforms/prices.csv``."""

    name: str
    num_cpus: float
    memory_mb: int

    @property
    def api_name(self) -> str:
        """The name in API requests."""
        return self.name.replace(" ", "_")

    @property
    def is_free(self) -> bool:
        """Sleeps after 15 idle minutes, has no disk and no choice of the shutdown delay."""
        return self.name == "free"


NAMED = (
    Plan("free", 0.1, 512),
    Plan("starter", 0.5, 512),
    Plan("standard", 1, 2048),
    Plan("pro", 2, 4096),
    Plan("pro plus", 4, 8192),
    Plan("pro max", 4, 16384),
    Plan("pro ultra", 8, 32768),
)
"""The names that every Blueprint accepts, smallest first."""

SIZED = tuple(
    Plan(name, float(name.partition("c-")[0]), memory_gb * 1024 if memory_gb else 512)
    for name, memory_gb in {
        "0.5c-512mb": 0, "1c-2g": 2, "2c-4g": 4, "2c-8g": 8, "2c-16g": 16, "4c-8g": 8, "4c-16g": 16, "4c-32g": 32,
        "8c-16g": 16, "8c-32g": 32, "8c-64g": 64, "12c-24g": 24, "12c-48g": 48, "12c-96g": 96,
    }.items()
)  # fmt: skip
"""Named by their size: in the API since August 2026; that Blueprints take them was not seen."""

PLANS = {plan.name: plan for plan in (*NAMED, *SIZED)}
REGIONS = ("frankfurt", "ohio", "oregon", "singapore", "virginia")

RUNTIME_MB = 700
"""Python, torch and transformers beside the weights, with room for the KV cache of a small model."""

WEIGHTS_FACTOR = 1.2
"""Memory per byte of weights: some are copied into another layout for the CPU's matrix products."""


def needed_mb(num_weight_bytes: int, num_cache_bytes: int = 0) -> int:
    """Megabytes of memory that a model of this size needs on a CPU; an estimate, on the safe side.

    Args:
        num_weight_bytes: Of the weights as they are loaded.
        num_cache_bytes: Of the KV cache, beyond what fits beside a small model anyway.
    """
    return RUNTIME_MB + round((num_weight_bytes * WEIGHTS_FACTOR + num_cache_bytes) / 2**20)


def smallest_plan(num_weight_bytes: int) -> Plan:
    """The cheapest paid plan that holds the model.

    Raises:
        ConfigError: none does.
    """
    wanted = needed_mb(num_weight_bytes)
    for plan in (*NAMED[1:], PLANS["8c-64g"], PLANS["12c-96g"]):
        if plan.memory_mb >= wanted:
            return plan
    raise ConfigError(
        f"the model needs about {wanted} MB, and Render's largest plan has {PLANS['12c-96g'].memory_mb} MB: "
        "serve it on a GPU elsewhere and put a gateway on Render (--gateway URL)"
    )
