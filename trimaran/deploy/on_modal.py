"""A deploy on Modal, by Modal's own command: sent, taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from serve.errors import ConfigError, ServeError
from trimaran import ledger
from trimaran.deploy.proof import KEY_VARIABLE, Door, Proof
from trimaran.platforms.modal import client

if TYPE_CHECKING:
    from serve.settings import Settings


class ModalSide:
    """See :class:`~trimaran.deploy.proof.Side`.

    Args:
        name: The app's.
        settings: Of the server.
        knobs: Of the adapter, as variables.
        arguments: For Modal's command.
    """

    platform = "modal"

    def __init__(self, name: str, settings: Settings, knobs: Mapping[str, str], arguments: tuple[str, ...]) -> None:
        self.name = name
        self.has_changed = False
        self.before: str | None = None
        self.nothing = f"this was the first deploy of {name}"
        self.restores: int | None = None
        self.mend = (
            f"See why: trimaran logs modal --name {name}\nMend it with another deploy, or end it: modal app stop {name}"
        )
        self._settings, self._knobs, self._arguments = settings, knobs, arguments
        self._version, self._url = "", ""

    def remember(self, proof: Proof) -> None:
        """See :class:`~trimaran.deploy.proof.Side`."""
        if not (self._key(proof) or self._settings.allow_anonymous):
            raise ConfigError(f"--verify needs one of the server's keys: export it as {KEY_VARIABLE}")
        is_private = self._knobs.get("SERVE_MODAL_PROXY_AUTH") == "true"
        if is_private and not {"modal-key", "modal-secret"} <= {name.lower() for name in proof.headers}:
            raise ConfigError(
                "SERVE_MODAL_PROXY_AUTH lets nobody in without Modal's own keys: "
                "give --verify-header 'Modal-Key: wk-...' --verify-header 'Modal-Secret: ws-...'"
            )
        try:
            newest = client.history(self.name)[0]
        except (ConfigError, LookupError):  # no such app
            return
        self._version = str(newest["version"])
        self.before = f"version {self._version}"
        self.restores = ledger.newest("modal", self.name, lambda entry: entry.revision == self._version)

    def send(self, entry: ledger.Entry, *, wait: bool) -> None:
        """See :class:`~trimaran.deploy.proof.Side`.  Modal's command itself waits."""
        del wait
        configuration = {**self._settings.model_dump(mode="json"), **self._knobs, "SERVE_MODAL_NAME": self.name}
        entry.configuration = ledger.fingerprint(configuration)
        click.echo("$ modal deploy deploy/modal/app.py", err=True)
        entry.url = self._url = client.deploy(
            self._arguments, {"SERVE_MODAL_NAME": self.name}, lambda line: click.echo(line, nl=False, err=True)
        )
        self.has_changed = True
        note_version(entry)

    def door(self, proof: Proof) -> Door:
        """See :class:`~trimaran.deploy.proof.Side`."""
        if not self._url:
            raise ServeError("Modal's command did not tell the app's address, so that it cannot be verified")
        return Door(self._url, self._key(proof), limit=self._settings.limit_concurrency)

    def _key(self, proof: Proof) -> str:
        """Also of a file of settings; a hash is no key."""
        own = (key.get_secret_value() for key in self._settings.api_keys)
        return proof.key or next((key for key in own if not key.startswith("sha256:")), "")

    def take_back(self, entry: ledger.Entry) -> None:
        """See :class:`~trimaran.deploy.proof.Side`."""
        entry.url = self._url
        client.rollback(self.name, self._version)
        note_version(entry)


def note_version(entry: ledger.Entry) -> None:
    """What Modal calls the newest deployment: a version, and the commit of the checkout that was sent."""
    entry.result = ledger.LIVE
    try:
        newest = client.history(entry.name)[0]
    except (ServeError, LookupError) as error:
        click.echo(f"Note: the version is not known: {error}", err=True)
        return
    entry.revision = newest.get("version")
    entry.artifact = newest.get("commit")
