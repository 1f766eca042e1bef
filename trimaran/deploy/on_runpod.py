"""A deploy on RunPod: sent, waited for, taken back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import click

from serve.errors import ConfigError, ServeError
from trimaran import ledger
from trimaran.deploy.proof import KEY_VARIABLE, Door, Proof, limit_of
from trimaran.platforms.runpod.api import API, RunpodApi
from trimaran.platforms.runpod.endpoint import (
    FLASHBOOT_SUFFIX,
    EndpointSpec,
    address,
    configuration,
    create_body,
    update_body,
)

POLL_S, WAIT_S = 3.0, 1800.0
STALE_S = 300.0
"""So long the workers of the version before may take to end before a deploy is verified beside them."""

READY = {"RUNNING", "IDLE"}

Json = dict[str, Any]


def account_key() -> str:
    """The key of this environment for RunPod's API, which also opens the endpoints."""
    key = os.environ.get("RUNPOD_API_KEY")
    if not key:
        raise ConfigError("set RUNPOD_API_KEY to a key from RunPod's Settings > API Keys")
    return key


def open_api() -> RunpodApi:
    """RunPod's API with the key of this environment."""
    return RunpodApi(account_key(), os.environ.get("RUNPOD_API_URL", API))


class RunpodSide:
    """See :class:`~trimaran.deploy.proof.Side`.  ``endpoint_id`` chooses among several of one name."""

    platform = "runpod"

    def __init__(self, spec: EndpointSpec, endpoint_id: str | None) -> None:
        self.name = spec.name
        self.has_changed = False
        self.before: str | None = None
        self.nothing = f"this was the first deploy of {spec.name}"
        self.restores: int | None = None
        self.mend = ""
        self._spec = spec
        self._api = open_api()
        self._current = self._api.find(spec.name, endpoint_id)
        self._body = create_body(spec) if self._current is None else update_body(spec, self._current)
        self._endpoint: Json = {}
        self._is_verified = False

    def remember(self, proof: Proof) -> None:
        """See :class:`~trimaran.deploy.proof.Side`."""
        if self._has_own_keys(self._body) and not proof.key:
            raise ConfigError(f"--verify needs one of the server's own keys: export it as {KEY_VARIABLE}")
        self._is_verified = True
        if self._current is None:
            return
        image, now = self._current.get("image"), ledger.fingerprint(configuration(self._current))
        self.before = f"image {image} and the variables of then"
        self.restores = ledger.newest(
            "runpod", self.name, lambda entry: (entry.artifact, entry.configuration) == (image, now)
        )

    def send(self, entry: ledger.Entry, *, wait: bool) -> None:
        """See :class:`~trimaran.deploy.proof.Side`."""
        spec, current, body = self._spec, self._current, self._body
        entry.artifact, entry.configuration = spec.image, ledger.fingerprint(configuration(body))
        endpoint = self._api.create(body) if current is None else self._api.update(current["id"], body)
        self.has_changed, self._endpoint = True, endpoint
        self.mend = (
            f"See why: trimaran deploy runpod logs --id {endpoint['id']}\nMend it with another deploy, or delete it: "
            f"trimaran deploy runpod delete --id {endpoint['id']}"
        )
        self._note(entry, endpoint)
        if current is not None and ledger.fingerprint(configuration(current)) == entry.configuration:
            self.before, self.nothing = None, "this deploy changed nothing"
        click.echo(f"{'Updated' if current else 'Created'} {endpoint['name']} ({endpoint['id']})", err=True)
        if body["env"].get("SERVE_ALLOW_ANONYMOUS") == "true" and spec.mode == "http":
            click.echo(
                "Note: the server asks for no key of its own; whoever has a key of your RunPod account can use it.  "
                "--api-keys-secret adds ours, which callers send as X-API-Key.",
                err=True,
            )
        if wait:
            _wait(self._api, endpoint["id"], is_alone=self._is_verified)
            entry.result = ledger.LIVE

    def _note(self, entry: ledger.Entry, endpoint: Json) -> None:
        entry.service, entry.url, entry.artifact = endpoint["id"], address(endpoint), endpoint.get("image")
        entry.configuration = ledger.fingerprint(configuration(endpoint))
        entry.revision = self._api.newest_version(endpoint["id"])

    def _has_own_keys(self, endpoint: Json) -> bool:
        environment: dict[str, str] = endpoint.get("env") or {}
        return self._spec.mode == "http" and bool(environment.get("SERVE_API_KEYS"))

    def door(self, proof: Proof) -> Door:
        """See :class:`~trimaran.deploy.proof.Side`.  RunPod's edge keeps ``Authorization`` for the account's key.

        Workers do not begin anew with each change (of their number, say), so their age tells nothing.
        """
        account, url, limit = account_key(), address(self._endpoint), limit_of(self._body["env"])
        if not self._has_own_keys(self._body):
            return Door(url, account, is_new_process=False, limit=limit)
        sent = {"authorization": f"Bearer {account}"}
        return Door(url, proof.key, sent, key_header="x-api-key", is_new_process=False, limit=limit)

    def take_back(self, entry: ledger.Entry) -> None:
        """See :class:`~trimaran.deploy.proof.Side`.  RunPod has no rollback: what this deploy set is set back."""
        before = self._current or {}
        body = {field: before[field] for field in self._body if before.get(field) is not None}
        self._note(entry, self._api.update(self._endpoint["id"], body))
        if missing := sorted(set(self._body) - set(body)):
            click.echo(f"Note: RunPod had no value for {', '.join(missing)} before; they stay as deployed", err=True)


def _wait(api: RunpodApi, endpoint_id: str, *, is_alone: bool = False) -> None:
    """Until a worker of this version is ready; with ``is_alone`` also until those of the one before are gone."""
    shown, began = "", time.monotonic()
    while (waited_s := time.monotonic() - began) < WAIT_S:
        workers = api.workers(endpoint_id)["workers"]
        fresh = [worker["status"] for worker in workers if not worker["isStale"]]
        old = [worker for worker in workers if worker["isStale"] and worker["status"] in READY]
        text = ", ".join(sorted(fresh)) or "no worker yet"
        if is_alone and old:
            text += f"; {len(old)} of the version before"
        if text != shown:
            click.echo(f"  {text}", err=True)
            shown = text
        if READY & set(fresh) and not (is_alone and old and waited_s < STALE_S):
            if is_alone and old:
                click.echo("Note: workers of the version before still run; answers may be theirs", err=True)
            return
        time.sleep(POLL_S)
    raise ServeError("no worker became ready; see: trimaran deploy runpod logs")


def return_to(
    api: RunpodApi,
    endpoint: Json,
    image: str,
    *,
    tell: Callable[[ledger.Entry], None],
    restores: ledger.Entry | None = None,
    wait: bool = False,
) -> None:
    """Set an earlier image, note it in the ledger, and ``tell``; ``restores`` is the entry that is returned to."""
    name = endpoint["name"].removesuffix(FLASHBOOT_SUFFIX)
    with ledger.recording("runpod", name, "rollback", tell) as entry:
        entry.restores, entry.artifact = restores.number if restores else None, image
        endpoint = api.update(endpoint["id"], {"image": image})
        entry.service, entry.url = endpoint["id"], address(endpoint)
        entry.configuration = ledger.fingerprint(configuration(endpoint))
        entry.revision = api.newest_version(endpoint["id"])
        click.echo(f"{name} goes back to {image}", err=True)
        if wait:
            _wait(api, endpoint["id"])
            entry.result = ledger.LIVE
