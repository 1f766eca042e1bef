"""Render's rules as measurements of a running server: each kept, broken, or not known."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from enum import Enum

import httpx2 as httpx

ANSWER_S, OFF_ROTATION_S, RESTART_S, HEALTHY_S = 5.0, 15.0, 60.0, 900.0
"""A check's patience; failing so long takes it out of rotation, or restarts it; the time until its first success."""

PROBE_EVERY_S = 0.25


class Verdict(Enum):
    """What became of a rule."""

    KEPT = "kept"
    BROKEN = "BROKEN"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule, what became of it, and what was measured."""

    rule: str
    verdict: Verdict
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict.value:<8} {self.rule:<34} {self.detail}"


def judged(rule: str, is_kept: bool | None, detail: str) -> Finding:
    """A finding; None is not known."""
    verdict = Verdict.UNKNOWN if is_kept is None else Verdict.KEPT if is_kept else Verdict.BROKEN
    return Finding(rule, verdict, detail)


@dataclass
class Prober:
    """Asks a path again and again, as Render does, in a thread of its own.

    ``slowest_s`` and ``longest_failure_s`` begin with the first success.
    """

    url: str
    healthy_at: float | None = None
    slowest_s: float = 0.0
    longest_failure_s: float = 0.0
    num_probes: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, after the probe that is on its way."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        failing_since: float | None = None
        with httpx.Client(timeout=ANSWER_S) as client:
            while not self._ended.is_set():
                began = time.monotonic()
                is_good = self._probe(client)
                now = time.monotonic()
                if is_good:
                    self.healthy_at = self.healthy_at or now
                    failing_since = None
                if self.healthy_at is not None and not self._ended.is_set():
                    self.num_probes += 1
                    self.slowest_s = max(self.slowest_s, now - began)
                    if not is_good:
                        failing_since = failing_since or began
                        self.longest_failure_s = max(self.longest_failure_s, now - failing_since)
                self._ended.wait(PROBE_EVERY_S)

    def _probe(self, client: httpx.Client) -> bool:
        try:
            return 200 <= client.get(self.url).status_code < 400
        except httpx.HTTPError:
            return False

    def _failure(self) -> str:
        failed = f"longest failure {self.longest_failure_s:.1f} s"
        return f"{failed}: Render restarts it" if self.longest_failure_s >= RESTART_S else failed

    def findings(self) -> list[Finding]:
        """The two rules of a service that is live."""
        if self.healthy_at is None:
            return []
        checks = f"{self.num_probes} checks"
        return [
            judged(
                "health checks answer within 5 s",
                self.slowest_s < ANSWER_S,
                f"slowest {self.slowest_s:.2f} s of {checks}",
            ),
            judged(
                "never fails for 15 s",
                self.longest_failure_s < OFF_ROTATION_S,
                self._failure(),
            ),
        ]
