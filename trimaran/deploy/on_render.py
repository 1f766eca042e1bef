"""A deploy on Render: sent, waited for, taken back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import click

from serve.errors import ConfigError, ServeError
from trimaran import ledger
from trimaran.deploy.proof import Door, Proof, limit_of
from trimaran.platforms.render.api import API, ENDED, RenderApi, address, artifact
from trimaran.platforms.render.service import ServiceSpec, create_body, update_body

POLL_S = 3.0

Json = dict[str, Any]


def open_api() -> RenderApi:
    """Render's API with the key of this environment."""
    key = os.environ.get("RENDER_API_KEY")
    if not key:
        raise ConfigError("set RENDER_API_KEY to a key from Render's Account Settings > API Keys")
    return RenderApi(key, os.environ.get("RENDER_API_URL", API))


class RenderSide:
    """See :class:`~trimaran.deploy.proof.Side`.  ``owner`` is the workspace's id, where there are several."""

    platform = "render"

    def __init__(self, spec: ServiceSpec, owner: str | None) -> None:
        self.name = spec.name
        self.has_changed = False
        self.before: str | None = None
        self.nothing = f"this was the first deploy of {spec.name}"
        self.restores: int | None = None
        self.mend = (
            f"See why: trimaran deploy render logs --name {spec.name}\n"
            f"Mend it with another deploy, or delete it: trimaran deploy render delete --name {spec.name}"
        )
        self._spec, self._owner = spec, owner
        self._api = open_api()
        self._current = self._api.find(spec.name)
        self._service: Json = self._current or {}
        self._live: Json = {}
        self._variables: dict[str, str] = {}

    def remember(self, proof: Proof) -> None:
        """See :class:`~trimaran.deploy.proof.Side`."""
        del proof  # Render tells the key
        if self._current is None:
            return
        live = next((one for one in self._api.deploys(self._current["id"]) if one["status"] == "live"), None)
        if live is None:
            self.nothing = f"no earlier deploy of {self.name} was live"
            return
        self._live, self._variables = live, self._api.variables(self._current["id"])
        self.before = f"deploy {live['id']} ({artifact(live) or 'its build'})"
        self.restores = ledger.newest("render", self.name, lambda entry: entry.revision == live["id"])

    def send(self, entry: ledger.Entry, *, wait: bool) -> None:
        """See :class:`~trimaran.deploy.proof.Side`."""
        spec = self._spec
        entry.configuration, entry.artifact = ledger.fingerprint(create_body(spec, "")), spec.image
        if self._current is None:
            self._service, entry.revision = self._api.create(spec, self._api.owner(self._owner))
            self.has_changed = True
        else:
            entry.revision = self._update(self._current)
        service = self._service
        click.echo(f"{'Updated' if self._current else 'Created'} {service['name']} ({service['id']})", err=True)
        entry.service, entry.url = service["id"], address(service)
        if wait and entry.revision:
            entry.artifact = artifact(wait_until_live(self._api, service["id"], entry.revision))
            entry.result = ledger.LIVE

    def _update(self, service: Json) -> str | None:
        """Variables that the spec does not name, and the generated key, stay."""
        self._api.change(service["id"], update_body(self._spec, service["ownerId"]))
        self.has_changed = True
        for key, value in {**self._spec.variables(), **self._spec.secrets}.items():
            self._api.set_variable(service["id"], key, value)
        return self._api.start_deploy(service["id"], self._spec.image) or None

    def door(self, proof: Proof) -> Door:
        """See :class:`~trimaran.deploy.proof.Side`.  Without a key of ours it is the one that Render has generated."""
        key = proof.key or self._api.api_key(self._service)
        return Door(address(self._service), key, limit=limit_of({**self._variables, **self._spec.variables()}))

    def take_back(self, entry: ledger.Entry) -> None:
        """See :class:`~trimaran.deploy.proof.Side`."""
        service_id = self._service["id"]
        entry.service, entry.url = service_id, address(self._service)
        if body := self._changed():
            self._api.change(service_id, body)
        for key, value in {**self._spec.variables(), **self._spec.secrets}.items():
            if value != (old := self._variables.get(key)):
                self._api.set_variable(service_id, key, old)
        deploy = self._api.deploy(service_id, self._live["id"])
        if deploy["status"] != "live":  # the new one never took over where it still is
            deploy = self._api.rollback(self._service, self._live["id"])
            entry.revision = deploy["id"]
            deploy = wait_until_live(self._api, service_id, deploy["id"])
        entry.revision, entry.artifact, entry.result = deploy["id"], artifact(deploy), ledger.LIVE

    def _changed(self) -> Json:
        """What to ask for so that image, source and size are those of before."""
        before = self._current or {}
        sent = update_body(self._spec, before["ownerId"])
        details: Json = before.get("serviceDetails") or {}
        body: Json = {key: before[key] for key in ("repo", "branch") if key in sent and before.get(key)}
        if "image" in sent and before.get("imagePath"):
            body["image"] = {"ownerId": before["ownerId"], "imagePath": before["imagePath"]}
        if changed := {
            key: details[key]
            for key, value in sent["serviceDetails"].items()
            if details.get(key) not in (None, value) and not isinstance(value, dict)
        }:
            body["serviceDetails"] = changed
        return body


def wait_until_live(api: RenderApi, service_id: str, deploy_id: str) -> Json:
    """The deploy, when it is live.

    Raises:
        ServeError: it ended otherwise.
    """
    shown = ""
    while True:
        deploy = api.deploy(service_id, deploy_id)
        status = str(deploy["status"])
        if status != shown:
            click.echo(f"  {status}", err=True)
            shown = status
        if status == "live":
            return deploy
        if status in ENDED:
            raise ServeError(f"the deploy ended as {status}; see: trimaran deploy render logs")
        time.sleep(POLL_S)


def return_to(
    name: str,
    deploy_id: str | None,
    *,
    wait: bool,
    tell: Callable[[ledger.Entry], None],
    restores: ledger.Entry | None = None,
) -> None:
    """Roll back, wait, note it in the ledger, and ``tell``; ``restores`` is the entry that is returned to."""
    api = open_api()
    service = api.get(name)
    with ledger.recording("render", name, "rollback", tell) as entry:
        entry.restores = restores.number if restores else None
        deploy = api.rollback(service, deploy_id)
        entry.service, entry.revision, entry.url = service["id"], deploy["id"], address(service)
        entry.artifact = artifact(deploy)
        click.echo(f"Rolling back {name}: deploy {deploy['id']}", err=True)
        if wait:
            entry.artifact = artifact(wait_until_live(api, service["id"], deploy["id"]))
            entry.result = ledger.LIVE
