"""A plan for a terminal, and as JSON."""

from __future__ import annotations

from datetime import date
from typing import Any

from trimaran.plan.offers import Offer, Plan

GB = 1_000_000_000
COLUMNS = ("", "machine", "memory", "at once", "$/h up", "$/month", "$/1M out", "up", "wait for boot", "even at")


def as_json(plan: Plan, warning: str | None) -> dict[str, Any]:
    """Everything that the table shows, and what it was computed from."""
    need, wishes = plan.need, plan.wishes
    return {
        "model": {name: getattr(need, name) for name in type(need).__dataclass_fields__},
        "load": {
            "requests_per_hour": wishes.load.per_hour,
            "prompt_tokens": wishes.load.prompt_tokens,
            "output_tokens": wishes.load.output_tokens,
            "concurrency": wishes.concurrency,
        },
        "always_on": {"usd_per_hour": plan.always_on_usd_per_hour, "machine": plan.always_on_name or None},
        "warning": warning,
        "offers": [offer.as_json() for offer in plan.offers],
    }


def as_text(plan: Plan, shows_all: bool) -> str:
    """A table, what it means, and where its numbers come from."""
    need, load = plan.need, plan.wishes.load
    lines = [
        f"model  {need.model}: {_billions(need.num_parameters)} parameters, {_gb(need.weight_bytes)} of weights"
        + (f" ({need.quantization})" if need.quantization else f" in {8 * need.value_bytes} bits"),
        f"cache  {_gb(need.kv_bytes_per_sequence)} for each sequence of {need.context} tokens ({need.method})",
        f"load   {load.per_hour:g} requests an hour, {load.prompt_tokens} + {load.output_tokens} tokens,"
        f" {plan.wishes.concurrency} at once",
    ]
    lines += [f"note   {note}" for note in need.notes]
    fitting = plan.fitting
    lines.append("")
    if fitting:
        lines += _table([COLUMNS, *(_row(offer) for offer in fitting)])
        lines += ["", *_explained(plan)]
    else:
        lines.append("It fits on no machine that is known here:")
    refused = [offer for offer in plan.offers if not offer.fits]
    if shows_all or not fitting:
        lines += [f"  {offer.machine.platform} {offer.machine.name}: {offer.refusal}" for offer in refused]
    elif refused:
        lines.append(f"{len(refused)} machines do not fit; --all shows why.")
    return "\n".join(lines)


def _explained(plan: Plan) -> list[str]:
    lines = [
        "up: share of the time that is paid for.  wait for boot: share of requests that find the machine asleep or",
        "booting, and the mean seconds they wait.  Seconds of requests and boots are estimates until you measure them:",
        "--seconds and --cold-start take yours.",
    ]
    if plan.always_on_usd_per_hour is not None:
        lines.append(
            f"even at: requests an hour from which an always-on machine for ${plan.always_on_usd_per_hour:.3g} an hour"
            f" ({plan.always_on_name}) is cheaper."
        )
    named: dict[tuple[str, str], list[str]] = {}
    for offer in plan.fitting:
        if offer.remark:
            named.setdefault((offer.machine.platform, offer.remark), []).append(offer.machine.name)
    lines += [f"{platform} {', '.join(sorted(names))}: {remark}" for (platform, remark), names in sorted(named.items())]
    days = sorted({offer.price.day for offer in plan.fitting if offer.price})
    if days:
        lines.append(f"prices {_days(days)}; list prices of one GPU, without taxes, disks and traffic")
    return lines


def _days(days: list[date]) -> str:
    return f"of {days[0]}" if len(days) == 1 else f"of {days[0]} to {days[-1]}"


def _row(offer: Offer) -> tuple[str, ...]:
    machine = offer.machine
    start = (machine.platform, machine.name, machine.memory, str(offer.max_concurrency))
    if offer.cost is None or offer.terms is None:
        return (*start, "?", "?", "?", "", "", "")
    done = offer.cost
    wait = f"{done.boot_wait_share:.0%}, {done.mean_boot_wait_s:.0f} s" if offer.terms.idle_s is not None else "none"
    replicas = f" x{done.num_replicas}" if done.num_replicas > 1 else ""
    even = "always on" if offer.terms.idle_s is None else "never"
    if offer.break_even_per_hour is not None:
        even = f"{offer.break_even_per_hour:.3g}/h"
    return (
        *start,
        f"{offer.terms.usd_per_hour_up:.3f}{replicas}",
        f"{done.usd_per_month:,.2f}",
        f"{done.usd_per_million_output_tokens:,.2f}",
        f"{done.up_share:.0%}",
        wait,
        even,
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _gb(count: int) -> str:
    return f"{count / GB:.3g} GB" if count >= GB / 10 else f"{count / 1e6:.3g} MB"


def _billions(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"
