"""What the commands that change something say on standard output: an address, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from trimaran import ledger

if TYPE_CHECKING:
    from trimaran.verify.outcome import Outcome

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")

FIELDS = (
    *("platform", "name", "action", "service", "url", "revision", "artifact", "configuration", "result", "verify"),
    *("restores", "seconds", "error"),
)


def described(entry: ledger.Entry, *, rolled_back: bool = False, outcomes: Sequence[Outcome] = ()) -> dict[str, Any]:
    """An entry of the ledger as JSON, always with the same keys; ``checks`` are those of ``--verify``."""
    shown = {name: getattr(entry, name) for name in FIELDS}
    return {**shown, "rolled_back": rolled_back, "checks": [asdict(outcome) for outcome in outcomes]}


def teller(as_json: bool) -> Callable[[ledger.Entry], None]:
    """Says what became of one deploy or rollback, when it is in the ledger."""

    def tell(entry: ledger.Entry) -> None:
        if as_json:
            click.echo(json.dumps(described(entry), indent=2))
        elif entry.result != ledger.FAILED and entry.url:
            click.echo(entry.url)

    return tell


def deleted(platform: str, name: str, service: str, as_json: bool) -> None:
    """Says that a service is gone."""
    click.echo(f"Deleted {name} ({service})", err=True)
    if as_json:
        entry = ledger.Entry(platform=platform, name=name, action="delete", result="deleted", service=service)
        click.echo(json.dumps(described(entry), indent=2))
