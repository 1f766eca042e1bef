"""The result for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from trimaran.verify.outcome import Outcome, Status
from trimaran.verify.target import Target

WORDS = {Status.PASSED: "ok", Status.FAILED: "FAILED", Status.SKIPPED: "skipped"}
BAR = 40


def is_good(outcomes: Sequence[Outcome]) -> bool:
    """Whether nothing failed."""
    return all(outcome.status is not Status.FAILED for outcome in outcomes)


def line(outcome: Outcome) -> str:
    """One check, for people."""
    return f"{WORDS[outcome.status]:8} {outcome.name}: {outcome.message}"


def waterfall(phases: Mapping[str, float]) -> list[str]:
    """The phases of the server's last cold start, one under the other, to one scale."""
    parts = {name: seconds for name, seconds in phases.items() if name != "total" and seconds > 0}
    total = sum(parts.values())
    if not total:
        return []
    lines, at = [f"Cold start, {total:.2f} s"], 0.0
    for name, seconds in parts.items():
        begin, width = round(at / total * BAR), max(1, round(seconds / total * BAR))
        lines.append(f"  {name:28} {seconds:8.2f} s  {' ' * min(begin, BAR - 1)}{'#' * width}")
        at += seconds
    return lines


def summary(outcomes: Sequence[Outcome]) -> str:
    """The last line."""
    counts = {status: sum(outcome.status is status for outcome in outcomes) for status in Status}
    counted = f"{counts[Status.PASSED]} passed, {counts[Status.FAILED]} failed, {counts[Status.SKIPPED]} skipped"
    return f"{'Verified' if is_good(outcomes) else 'Not as promised'}: {counted}"


def as_json(target: Target, outcomes: Sequence[Outcome], phases: Mapping[str, float]) -> str:
    """Everything, for machines."""
    body = {
        "url": target.url,
        "model": target.model,
        "passed": is_good(outcomes),
        "checks": [asdict(outcome) for outcome in outcomes],
        "cold_start_s": dict(phases),
    }
    return json.dumps(body, indent=2)
