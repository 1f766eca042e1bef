"""The check of a redeploy: streams are held open and requests sent while the user's command replaces the server."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import click
import httpx2 as httpx

from trimaran.verify.answers import PROMPT, STREAM_TOKENS
from trimaran.verify.load import num_slots
from trimaran.verify.outcome import Outcome, failed, passed, skipped
from trimaran.verify.target import COMPLETIONS, Stream, Target

NAME = "redeploy"
NUM_STREAMS = 4
HELD_TOKENS = 512
PROBE_S = 0.25
UNKNOWN_S = 10.0
"""So long a server that does not tell its age is watched after the command."""
SLACK_S = 0.05
STDERR = 2
NEW_CONNECTION = {"connection": "close"}
"""A kept connection would stay with the old server, whoever switches in front."""

Birth = tuple[float, float]
"""The earliest and the latest moment at which a process may have been born."""


@dataclass(slots=True)
class Watch:
    """What clients saw.  Times are of ``time.monotonic()``."""

    whole: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    cut: list[str] = field(default_factory=list[str])
    refused: list[str] = field(default_factory=list[str])
    put_off: list[float] = field(default_factory=list[float])
    """When requests got 503 with Retry-After."""
    answered: list[float] = field(default_factory=list[float])
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    began: float = field(default_factory=time.monotonic)

    def refuse(self, status: int, headers: Mapping[str, str]) -> None:
        """A request that got no answer."""
        with self.lock:
            if status == 503 and "retry-after" in headers:
                self.put_off.append(time.monotonic())
            else:
                self.refused.append(f"{status}{' without Retry-After' if status == 503 else ''}{self._at()}")

    def lose(self, error: Exception) -> None:
        """A request that reached nobody."""
        with self.lock:
            self.refused.append(f"{type(error).__name__}: {error}"[:120] + self._at())

    def _at(self) -> str:
        return f" after {time.monotonic() - self.began:.1f} s"


def check_redeploy(target: Target, command: str, wait_s: float) -> Outcome:
    """No stream is cut and no request refused, but by 503 with Retry-After, while ``command`` replaces the server.

    The server must be another process within ``wait_s`` seconds of the command's end, as far as it tells its age.
    """
    known = [birth for _ in range(3) if (birth := _birth(target)) is not None]
    with target.streaming(target.chat(PROMPT, HELD_TOKENS, ignore_eos=True)) as (stream, _):
        tokens = STREAM_TOKENS if stream.status == 400 else HELD_TOKENS  # a short context
    watch = Watch()
    number = max(1, min(NUM_STREAMS, (num_slots(target) or NUM_STREAMS + 1) - 1))  # the short requests need a slot too
    opened = threading.Barrier(number + 1, timeout=target.timeout_s)
    threads = [threading.Thread(target=_hold, args=(target, watch, tokens, opened)) for _ in range(number)]
    threads.append(threading.Thread(target=_probe, args=(target, watch)))
    for thread in threads:
        thread.start()
    try:
        opened.wait()
        watch.began = time.monotonic()
        status, replaced = _run(target, command, known, wait_s)
    except threading.BrokenBarrierError:
        return failed(NAME, f"the command was not run: {number} streams could not be held open before it")
    finally:
        watch.stop.set()
        for thread in threads:
            thread.join()
    return _judged(watch, status, replaced, is_age_known=bool(known))


def _run(target: Target, command: str, known: list[Birth], wait_s: float) -> tuple[int, float | None]:
    """The command's exit status, and when another process first answered."""
    replaced: float | None = None
    ended = time.monotonic()
    click.echo(f"$ {command}", err=True)
    with subprocess.Popen(command, shell=True, stdout=STDERR) as process:  # noqa: S602 - the user's own command
        while True:
            if replaced is None and known and _is_another(_birth(target), known):
                replaced = time.monotonic()
            now = time.monotonic()
            if process.poll() is None:
                ended = now
            elif process.returncode or replaced or now - ended >= (wait_s if known else min(wait_s, UNKNOWN_S)):
                time.sleep(2 * PROBE_S)  # requests of after the switch count too
                return process.returncode, replaced
            time.sleep(PROBE_S)


def _birth(target: Target) -> Birth | None:
    asked = time.monotonic()
    try:
        age_s = float(target.ask("GET", "/version", headers=NEW_CONNECTION).json()["uptime_s"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return asked - age_s - SLACK_S, time.monotonic() - age_s + SLACK_S


def _is_another(birth: Birth | None, known: list[Birth]) -> bool:
    return birth is not None and all(birth[1] < first or birth[0] > last for first, last in known)


def _hold(target: Target, watch: Watch, tokens: int, opened: threading.Barrier) -> None:
    """One stream after the other, so that some are open whenever the old server is told to end."""
    is_first = True
    while not watch.stop.is_set():
        is_whole = _one_stream(target, watch, tokens, opened if is_first else None)
        if is_first and not is_whole:
            opened.abort()
        is_first = False
        if not is_whole:
            watch.stop.wait(PROBE_S)


def _one_stream(target: Target, watch: Watch, tokens: int, opened: threading.Barrier | None) -> bool:
    """Whether it came whole; with its first text it waits for the others at ``opened``."""
    began, stream = time.monotonic(), Stream()
    try:
        with target.streaming(target.chat(PROMPT, tokens, ignore_eos=True), NEW_CONNECTION) as (stream, events):
            for _ in events:
                if opened is not None and stream.pieces:
                    opened.wait()
                    opened = None
        defect = _defect(stream)
    except threading.BrokenBarrierError:
        return False
    except httpx.HTTPError as error:
        if not stream.pieces:
            watch.lose(error)
            return False
        defect = type(error).__name__
    if stream.status != 200:
        watch.refuse(stream.status, stream.headers)
    elif defect:
        watch.cut.append(f"{defect} after {len(stream.pieces)} pieces of text")
    else:
        watch.whole.append((began, time.monotonic()))
    return stream.status == 200 and not defect


def _defect(stream: Stream) -> str:
    said = next((chunk["error"] for chunk in stream.chunks if chunk.get("error")), None)
    if said is not None:
        return f"an error in its place: {str(said.get('message'))[:80]}"
    return stream.broken or ("" if stream.is_done and stream.finish_reason else "no [DONE]")


def _probe(target: Target, watch: Watch) -> None:
    """Short requests at a steady pace."""
    while not watch.stop.is_set():
        try:
            body = target.chat("x", 1)
            answer = target.ask("POST", COMPLETIONS, json=body, headers=NEW_CONNECTION, is_patient=False)
        except httpx.HTTPError as error:
            watch.lose(error)
        else:
            if answer.status_code == 200:
                watch.answered.append(time.monotonic())
            else:
                watch.refuse(answer.status_code, answer.headers)
        watch.stop.wait(PROBE_S)


def _judged(watch: Watch, status: int, replaced: float | None, *, is_age_known: bool) -> Outcome:
    switched = [*([replaced] if replaced else []), *watch.put_off[:1]] or [watch.began]
    held = sum(any(began < moment < ended for moment in switched) for began, ended in watch.whole)
    pauses = [after - before for before, after in pairwise(watch.answered)]
    figures = {
        "whole": len(watch.whole),
        "held": held,
        "cut": watch.cut,
        "refused": watch.refused,
        "put_off": len(watch.put_off),
        "longest_pause_s": round(max(pauses, default=0.0), 2),
    }
    wrong = list(_wrong(watch, status, is_same=is_age_known and replaced is None))
    if wrong:
        return failed(NAME, "; ".join(wrong), **figures)
    if not held:
        return skipped(NAME, "no stream was open when the new server took over: its answers are too quick", **figures)
    seen = "the new server took over" if replaced else "the command began, and the server does not tell its age"
    return passed(
        NAME,
        f"{len(watch.whole)} streams whole, {held} of them open when {seen}; {len(watch.put_off)} requests put off; "
        f"longest pause {figures['longest_pause_s']} s",
        **figures,
    )


def _wrong(watch: Watch, status: int, *, is_same: bool) -> Iterator[str]:
    if status:
        yield f"the command ended with status {status}"
    if watch.cut:
        yield (
            f"{len(watch.cut)} of {len(watch.cut) + len(watch.whole)} streams were cut ({watch.cut[0]}): the old "
            "server does not drain, or is killed before it has; SERVE_DRAIN_TIMEOUT_S must be long enough, and below "
            "the platform's grace"
        )
    if watch.refused:
        yield (
            f"{len(watch.refused)} requests were refused otherwise than by 503 with Retry-After ({watch.refused[0]}): "
            "the new server must answer before the old one ends"
        )
    if is_same and not status:
        yield "the same process still answers: the command has redeployed nothing, or needs a longer --wait"
