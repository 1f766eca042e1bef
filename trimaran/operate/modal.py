"""An app on Modal, through Modal's own command."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import click

from serve.errors import ConfigError
from trimaran import ledger
from trimaran.deploy.on_modal import note_version
from trimaran.operate.service import DEPLOYING, FAILED, LIVE, STOPPED, Deploy, Line, Status
from trimaran.platforms.modal import client

STATES = {"deployed": LIVE, "initializing...": DEPLOYING, "stopped": STOPPED, "stopping...": STOPPED}
NUM_DEPLOYS = 5
TIMED = re.compile(r"^(\d{4}-\d\d-\d\d[ T][\d:.]+(?:[+-][\d:]+|Z)?) (.*)$")


class ModalService:
    """By name, in the environment that Modal's command chooses: MODAL_ENVIRONMENT, else the profile's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def status(self) -> Status:
        """See :class:`~trimaran.operate.service.Service`."""
        info = client.info(self._name)
        state = str(info["lifecycle"]["state"])
        deploys = [
            Deploy(
                revision=str(made["version"]),
                state="newest" if at == 0 else "earlier",
                time=str(made.get("time_deployed") or ""),
                artifact=made.get("commit"),
            )
            for at, made in enumerate(client.history(self._name)[:NUM_DEPLOYS])
        ]
        return Status(
            platform="modal",
            name=self._name,
            service=str(info["app_id"]),
            state=STATES.get(state, FAILED),
            detail=state,
            url=last_url(self._name),
            artifact=deploys[0].artifact if deploys else None,
            running=len(client.containers(str(info["app_id"]))),
            deploys=deploys,
        )

    def logs(self, tail: int, *, follow: bool) -> Iterator[Line]:
        """See :class:`~trimaran.operate.service.Service`."""
        for line in client.logs(self._name, tail, follow=follow):
            timed = TIMED.match(line)
            yield Line(timed[1], "", timed[2]) if timed else Line("", "", line)

    def rollback(self, to: ledger.Entry | None, *, wait: bool | None, tell: Callable[[ledger.Entry], None]) -> None:
        """See :class:`~trimaran.operate.service.Service`.  Modal's command itself waits."""
        del wait
        if to is not None and not to.revision:
            raise ConfigError(f"the ledger has no version for number {to.number}; see: modal app history {self._name}")
        with ledger.recording("modal", self._name, "rollback", tell) as entry:
            entry.url = last_url(self._name)
            if to is not None:
                entry.restores, entry.configuration = to.number, to.configuration
            client.rollback(self._name, to.revision if to else None)
            note_version(entry)
            click.echo(f"{self._name} goes back to {to.revision if to else 'the version before'}", err=True)


def last_url(name: str) -> str | None:
    """Modal's command does not tell an app's address after the deploy; the ledger does."""
    entries, _ = ledger.read()
    known = [entry.url for entry in entries if (entry.platform, entry.name) == ("modal", name) and entry.url]
    return known[-1] if known else None
