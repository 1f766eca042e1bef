"""What each platform's cheapest machine costs, over the load: a picture, SVG or PNG by the file's name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.errors import ConfigError
from trimaran.plan.economics import cost
from trimaran.plan.offers import Offer, Plan

LOADS_PER_HOUR = [10 ** (step / 8) for step in range(33)]
"""From one request an hour to ten thousand."""

STYLES = ("-", "--", "-.", ":")
"""Lines differ by more than their colour."""


def curves(plan: Plan) -> list[tuple[Offer, list[float]]]:
    """For each platform its cheapest machine at the plan's load, and dollars a month at each of ``LOADS_PER_HOUR``."""
    best: dict[str, Offer] = {}
    for offer in plan.fitting:
        if offer.terms is not None:
            best.setdefault(offer.machine.platform, offer)
    return [(offer, [_monthly(plan, offer, load) for load in LOADS_PER_HOUR]) for offer in best.values()]


def _monthly(plan: Plan, offer: Offer, per_hour: float) -> float:
    if offer.terms is None:
        raise ValueError(f"{offer.machine.name} has no price")
    return cost(replace(plan.wishes.load, per_hour=per_hour), offer.terms).usd_per_month


def draw(plan: Plan, path: Path) -> None:
    """Write the picture.

    Raises:
        ConfigError: another ending than ``.svg`` or ``.png``, no price, no matplotlib, or a folder that is not there.
    """
    if path.suffix not in {".svg", ".png"}:
        raise ConfigError(f"--chart {path}: the file's name must end in .svg or .png")
    drawn = curves(plan)
    if not drawn:
        raise ConfigError("there is nothing to draw: no machine with a known price fits")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise ConfigError("--chart needs matplotlib; run: pip install 'trimaran[plan]'") from None
    figure: Any = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for (offer, values), style in zip(drawn, STYLES, strict=False):
        label = f"{offer.machine.platform} {offer.machine.name}"
        axes.plot(LOADS_PER_HOUR, values, style, linewidth=2, label=label)
    axes.axvline(plan.wishes.load.per_hour, color="0.6", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="requests an hour", ylabel="dollars a month")
    load = plan.wishes.load
    axes.set_title(f"{Path(plan.need.model).name}: {load.prompt_tokens} + {load.output_tokens} tokens a request")
    axes.grid(visible=True, which="major", color="0.9")
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"--chart {path} cannot be written: {error.strerror}") from None
