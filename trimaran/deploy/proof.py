"""``--verify`` of the deploys: the same checks as ``trimaran verify``, and what is done when one fails."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from serve.errors import ConfigError, ServeError
from trimaran import ledger
from trimaran.deploy.answer import described, json_option
from trimaran.progress import waiting

if TYPE_CHECKING:
    from trimaran.verify.outcome import Outcome
    from trimaran.verify.reference import Reference

ROLLED_BACK, NOT_ROLLED_BACK = 5, 6
"""Exit statuses when the proof failed: what ran before runs again; the new one is left, since nothing could be done."""

CONCURRENCY = 4
LIMIT = "SERVE_LIMIT_CONCURRENCY"
REQUEST_S = 120.0
KEY_VARIABLE = "TRIMARAN_VERIFY_KEY"

EXITS = (
    "Exit status with --verify: 0 verified; 1 the platform refused before anything changed; 2 wrong usage or no "
    "credentials; 5 a check failed or the server never became ready, and what ran before runs again; 6 the same, but "
    "there was nothing to roll back to, or the rollback failed"
)

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--verify", is_flag=True, help="Prove it when it is live; roll back when a check fails."),
    click.option("--verify-local", metavar="MODEL", help="--verify, with greedy tokens of MODEL, served here first."),
    click.option(
        "--verify-reference",
        type=click.Path(path_type=Path),
        help="--verify, with greedy tokens of a file of `trimaran verify --record`.",
    ),
    click.option(
        "--verify-wait",
        type=click.FloatRange(0, 7200),
        default=1800,
        show_default=True,
        help="Seconds for the cold start.",
    ),
    click.option("--verify-header", multiple=True, metavar="NAME:VALUE", help="Sent with every request; repeatable."),
    click.option(
        "--verify-key",
        envvar=KEY_VARIABLE,
        default="",
        help=f"The server's key.  Default: {KEY_VARIABLE}, else the first of SERVE_API_KEYS.",
    ),
    json_option,
)


def verify_options(command: Command) -> Command:
    """The options that every deploy has; :func:`proof` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Proof:
    """What shall be proven of a deploy.

    ``key`` is the server's own, empty where the platform has to be asked for it.
    """

    wanted: Reference | None
    wait_s: float
    key: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Door:
    """How a deployed service is asked; ``key_header`` is where ``key`` goes."""

    url: str
    key: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    key_header: str = "authorization"
    is_new_process: bool = True
    """Whether this deploy has begun processes, so that an older one is what ran before."""
    limit: int | None = None
    """Requests that one caller may have at once: SERVE_LIMIT_CONCURRENCY."""


def limit_of(environment: Mapping[str, str]) -> int | None:
    """What a server with these variables lets one caller have at once."""
    value = environment.get(LIMIT, "")
    return int(value) if value.isdecimal() else None


class Side(Protocol):
    """One platform's part of a deploy.  Methods raise ``ServeError`` with the platform's words."""

    platform: str
    name: str
    has_changed: bool
    """Whether the platform has taken something that could be taken back."""
    before: str | None
    """What ran before, in words; None: there is nothing to return to, and ``nothing`` says why."""
    nothing: str
    restores: int | None
    mend: str
    """Commands that mend or end a service that was left as it is."""

    def remember(self, proof: Proof) -> None:
        """Learn what runs now; refuse what could not be verified, before anything is changed."""
        ...

    def send(self, entry: ledger.Entry, *, wait: bool) -> None:
        """Deploy, and fill in the entry."""
        ...

    def door(self, proof: Proof) -> Door:
        """Where the deployed service is."""
        ...

    def take_back(self, entry: ledger.Entry) -> None:
        """Bring back what ran before, and fill in the rollback's entry."""
        ...


def proof(options: Mapping[str, Any]) -> Proof | None:
    """What the options ask for; the reference is made now, before anything is deployed.

    Raises:
        ServeError: the reference cannot be read or made.
    """
    local, file = options["verify_local"], options["verify_reference"]
    if not (options["verify"] or local or file):
        return None
    from trimaran.verify import reference  # noqa: PLC0415
    from trimaran.verify.command import parse_headers  # noqa: PLC0415

    if local and file:
        raise ConfigError("name a --verify-local or a --verify-reference, not both")
    headers = parse_headers(options["verify_header"])
    wanted = reference.read(file) if file else None
    if local:
        click.echo(f"Asking {local} on this machine ...", err=True)
        with reference.local_server(local) as own:
            wanted = reference.record(own)
    key = options["verify_key"] or os.environ.get("SERVE_API_KEYS", "").partition(",")[0].strip()
    return Proof(wanted, options["verify_wait"], "" if key.startswith("sha256:") else key, headers)


def carry_out(side: Side, proof: Proof | None, *, wait: bool, as_json: bool) -> None:
    """Deploy, prove, and take back what failed.  Prints the address, or one JSON object.

    Ends the command with ``ROLLED_BACK`` or ``NOT_ROLLED_BACK`` when the proof fails.
    """
    if proof is not None:
        side.remember(proof)
    entry = ledger.Entry(platform=side.platform, name=side.name)
    outcomes: list[Outcome] = []
    failure: ServeError | None = None
    try:
        with ledger.recording(side.platform, side.name) as entry:
            _deploy(side, proof, entry, outcomes, wait=wait)
    except ServeError as error:
        failure = error
    back: ledger.Entry | None = None
    if entry.verify == ledger.NOT_PASSED:
        if failure is not None:
            click.echo(f"trimaran: {failure.message}", err=True)
        back, failure = _roll_back(side), None
    is_back = back is not None and back.result != ledger.FAILED
    if as_json:
        shown = described(entry, rolled_back=is_back, outcomes=outcomes)
        click.echo(json.dumps(shown | ({"rollback": described(back)} if back else {}), indent=2))
    elif entry.verify != ledger.NOT_PASSED and failure is None:
        click.echo(entry.url)
    if failure is not None:
        raise failure
    if entry.verify == ledger.NOT_PASSED:
        sys.exit(ROLLED_BACK if is_back else NOT_ROLLED_BACK)


def _deploy(side: Side, proof: Proof | None, entry: ledger.Entry, outcomes: list[Outcome], *, wait: bool) -> None:
    began = time.monotonic()
    try:
        side.send(entry, wait=wait or proof is not None)
        if proof is not None:
            outcomes += _judged(proof, side.door(proof), began)
    except ServeError:
        if proof is not None and side.has_changed:
            entry.verify = ledger.NOT_PASSED
        raise
    if proof is not None:
        failed = next((outcome for outcome in outcomes if outcome.status == "failed"), None)
        entry.verify = ledger.NOT_PASSED if failed else ledger.PASSED
        entry.error = ledger.masked(f"verify: {failed.name}: {failed.message}") if failed else None


def _judged(proof: Proof, door: Door, began: float) -> list[Outcome]:
    """Every check's outcome, told as it comes; a server that never becomes ready has failed the first."""
    from trimaran.verify import report  # noqa: PLC0415
    from trimaran.verify.checks import checks, first_model, ready_within  # noqa: PLC0415
    from trimaran.verify.load import num_slots  # noqa: PLC0415
    from trimaran.verify.outcome import failed  # noqa: PLC0415
    from trimaran.verify.target import Target  # noqa: PLC0415

    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        click.echo(report.line(outcome), err=True)

    sent = {**door.headers, **proof.headers}
    with Target(door.url, door.key, REQUEST_S, sent, key_header=door.key_header) as target:
        click.echo(f"Verifying {target.url}", err=True)
        with waiting("Waiting until the new server is ready") if proof.wait_s else nullcontext():
            why = ready_within(target, proof.wait_s, is_ours=True, since=began if door.is_new_process else None)
        if why:
            tell(failed("ready", why))
            return outcomes
        try:
            target.model = first_model(target)
        except ConfigError as error:
            tell(failed("models", error.message))
            return outcomes
        at_once = min(CONCURRENCY, door.limit or CONCURRENCY, num_slots(target) or CONCURRENCY)
        for outcome in checks(target, proof.wanted, at_once):
            tell(outcome)
    click.echo(report.summary(outcomes), err=True)
    return outcomes


def _roll_back(side: Side) -> ledger.Entry | None:
    """The rollback's entry; None when there was nothing to return to.  What is left undone is told, with the remedy."""
    if side.before is None:
        click.echo(f"Not rolled back: {side.nothing}.  It stays as it is.\n{side.mend}", err=True)
        return None
    click.echo(f"Rolling back to {side.before}", err=True)
    entry = ledger.Entry(platform=side.platform, name=side.name, result=ledger.FAILED)
    try:
        with waiting("Rolling back"), ledger.recording(side.platform, side.name, "rollback") as entry:
            entry.restores = side.restores
            side.take_back(entry)
    except ServeError as error:
        click.echo(
            f"trimaran: the rollback failed: {error.message}\nWhat runs now: trimaran status {side.platform} --name "
            f"{side.name}\n{side.mend}",
            err=True,
        )
    else:
        click.echo(f"Rolled back: {side.before} runs again", err=True)
    return entry
