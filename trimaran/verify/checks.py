"""The checks in their order, and what comes before them: a server that answers, and its model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import httpx2 as httpx

from serve.errors import ConfigError
from trimaran.verify import answers, load, manners, realtime, redeploy
from trimaran.verify.outcome import Outcome, failed, skipped
from trimaran.verify.reference import Reference, check_golden
from trimaran.verify.target import Stream, Target

POLL_S = 1.0
BIRTH_S = 1.0
"""How far a process's age and our own clock may differ."""


def checks(
    target: Target, wanted: Reference | None, concurrency: int, command: str | None = None, wait_s: float = 300.0
) -> Iterator[Outcome]:
    """Every check, in order.  One that gets no whole answer has failed.

    ``command`` redeploys the server, which must be another one ``wait_s`` seconds after its end.
    """
    stream = Stream()
    try:
        outcome, stream = answers.check_stream(target)
    except httpx.HTTPError as error:
        outcome = failed("stream", f"no whole answer: {type(error).__name__}: {error}")
    yield outcome
    unknown = skipped("golden tokens", "nothing to compare with: give --local MODEL or --reference FILE")
    more = [("redeploy", partial(redeploy.check_redeploy, target, command, wait_s))] if command else []
    for name, check in (
        ("pace", partial(answers.check_pace, target, stream)),
        ("usage", partial(answers.check_usage, target, stream)),
        ("golden tokens", (lambda: unknown) if wanted is None else partial(check_golden, target, wanted)),
        ("keys", partial(manners.check_keys, target)),
        ("parameters", partial(manners.check_parameters, target)),
        ("realtime", partial(realtime.check_realtime, target, stream)),
        ("disconnect", partial(load.check_disconnect, target, stream)),
        ("concurrency", partial(load.check_concurrency, target, concurrency)),
        *more,
    ):
        try:
            yield check()
        except httpx.HTTPError as error:
            yield failed(name, f"no whole answer: {type(error).__name__}: {error}")


def ready_within(target: Target, wait_s: float, *, is_ours: bool = False, since: float | None = None) -> str:
    """Wait until the server answers.  Says why it does not; nothing when it does.

    Args:
        target: The server.
        wait_s: How long.
        is_ours: It is this project's server, which has /ready; another may be ready without it.
        since: A moment of ``time.monotonic()``.  A process that was born before does not count: while a deploy is under
            way the old one goes on to answer.
    """
    began = time.monotonic()
    while True:
        said = _not_ready(target, is_ours)
        if not said and since is not None and _is_older(target, since):
            said = "what ran before the deploy still answers, nothing new has come up"
        if not said or time.monotonic() - began >= wait_s:
            return said and f"{target.url} is not ready after {wait_s:g} s ({said})"
        time.sleep(min(POLL_S, wait_s))


def _not_ready(target: Target, is_ours: bool) -> str:
    path = target.ready_path
    try:
        status = target.ask("GET", path).status_code
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    if status == 200 or (status == 404 and not (is_ours or target.edge)):
        return ""
    if status in (401, 403) and target.is_queue:
        return ""  # a refused key is told later
    return f"{path} says {status}"


def _is_older(target: Target, since: float) -> bool:
    """Whether the process that answers was born before ``since``; False where it does not tell."""
    try:
        age_s = float(target.ask("GET", "/version").json()["uptime_s"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False
    return age_s > time.monotonic() - since + BIRTH_S


def first_model(target: Target) -> str:
    """The id of the first model that the server lists.

    Raises:
        ConfigError: it refuses the key, or lists none.
    """
    try:
        answer = target.ask("GET", "/v1/models")
        if answer.status_code in (401, 403):
            raise ConfigError(f"{target.url} refuses the key: give --key, or set SERVE_API_KEYS")
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{target.url}/v1/models lists no model; is it a server of OpenAI's API?") from error


def cold_start(target: Target) -> dict[str, float]:
    """Seconds of each phase of the server's last cold start, as ``/version`` says; empty where it does not."""
    try:
        phases: dict[str, float] = target.ask("GET", "/version").json().get("phases") or {}
        return {name: float(seconds) for name, seconds in phases.items()}
    except (httpx.HTTPError, ValueError, AttributeError, TypeError):
        return {}
