"""Checks of many requests: a client that leaves frees its slot, and as many run at once as promised."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx

from trimaran.verify.answers import PROMPT, STREAM_TOKENS
from trimaran.verify.outcome import Outcome, failed, passed, skipped
from trimaran.verify.target import Stream, Target

LONG_TOKENS = 512
FREED_S = 5.0
SHORTEST_WAIT_S = 0.2
POLL_S = 0.05


def num_running(target: Target) -> int | None:
    """Requests that run now, as ``/metrics`` says; None where it does not."""
    return _gauge(target, "trimaran_requests_running")


def num_slots(target: Target) -> int | None:
    """Requests that can run at once, as ``/metrics`` says; None where it does not."""
    try:
        return _gauge(target, "trimaran_slots")
    except httpx.HTTPError:
        return None


def _gauge(target: Target, name: str) -> int | None:
    answer = target.ask("GET", "/metrics")
    found = re.search(rf"^{name}(?:\{{[^}}]*\}})? (\d+)", answer.text, re.MULTILINE)
    return int(found[1]) if answer.status_code == 200 and found else None


def check_disconnect(target: Target, stream: Stream) -> Outcome:
    """The engine stops working for a client that is gone.

    It has half the time that the whole answer would take, at the pace of ``stream``, and ``FREED_S`` at most.
    """
    name = "disconnect"
    token_s = (stream.times_s[-1] - stream.times_s[0]) / len(stream.times_s) if stream.times_s else 0.0
    allowed_s = min(FREED_S, LONG_TOKENS * token_s / 2)
    if allowed_s < SHORTEST_WAIT_S:
        return skipped(name, "tokens come too quickly (or all at once) to see whether a left request goes on")
    before = num_running(target)
    if before is None:
        return skipped(name, "/metrics has no trimaran_requests_running")
    with target.streaming(target.chat(PROMPT, LONG_TOKENS, ignore_eos=True)) as (left, events):
        if left.status != 200:
            return skipped(name, f"a stream of {LONG_TOKENS} tokens was answered with {left.status}")
        for _ in events:
            if left.pieces:
                break
        during = num_running(target) or 0
    left_at = time.perf_counter()
    if during <= before:
        return skipped(name, "the request was over before it could be left, or another replica answers /metrics")
    while time.perf_counter() - left_at < allowed_s:
        if (num_running(target) or 0) <= before:
            freed_s = time.perf_counter() - left_at
            return passed(name, f"its slot was free after {freed_s:.2f} s", freed_s=round(freed_s, 3))
        time.sleep(POLL_S)
    return failed(
        name,
        f"{allowed_s:.1f} s after the client left, its request still runs: you pay for answers that nobody reads. "
        "Something in front keeps the connection open",
    )


def check_concurrency(target: Target, number: int) -> Outcome:
    """``number`` streams at once all come whole, and none waits for another's end."""
    name = f"concurrency of {number}"

    def one(index: int) -> tuple[float, Stream]:
        began = time.perf_counter()
        return began, target.stream(target.chat(f"{PROMPT} Chapter {index}.", STREAM_TOKENS, ignore_eos=True))

    with ThreadPoolExecutor(number) as threads:
        answers = list(threads.map(one, range(number)))
    bad = [stream.status if stream.status != 200 else "cut short" for _, stream in answers if not stream.is_done]
    if bad:
        return failed(name, f"{len(bad)} of {number} streams failed: {bad[:4]}", failed=len(bad))
    firsts = [began + stream.times_s[0] for began, stream in answers if stream.times_s]
    ends = [began + stream.total_s for began, stream in answers]
    shortest_s = min(stream.total_s for _, stream in answers)
    if number > 1 and shortest_s > 0.3 and firsts and max(firsts) > min(ends):
        waited = sum(first > min(ends) for first in firsts)
        return failed(
            name,
            f"{waited} of {number} streams began only after another had ended: fewer run at once than promised. "
            "Raise SERVE_MAX_BATCH_SIZE, or promise less with --concurrency",
            waited=waited,
        )
    return passed(name, f"{number} streams at once, all whole", longest_s=round(max(s.total_s for _, s in answers), 3))
