"""A web service on Render."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from serve.errors import ConfigError
from trimaran import ledger
from trimaran.deploy import on_render
from trimaran.operate.service import DEPLOYING, FAILED, LIVE, STOPPED, Deploy, Line, Status
from trimaran.platforms.render.api import ENDED, address, artifact

FOLLOW_S = 3.0
"""Render allows 30 requests for logs a minute."""

NUM_DEPLOYS = 5


class RenderService:
    """By name.

    Raises:
        ConfigError: there is no key, or no such service.
    """

    def __init__(self, name: str) -> None:
        self._api = on_render.open_api()
        self._service = self._api.get(name)
        self._name = name

    def status(self) -> Status:
        """See :class:`~trimaran.operate.service.Service`."""
        deploys = self._api.deploys(self._service["id"], limit=NUM_DEPLOYS)
        states = [str(deploy["status"]) for deploy in deploys]
        live = next((deploy for deploy in deploys if deploy["status"] == "live"), None)
        if self._service.get("suspended") == "suspended":
            state = STOPPED
        elif states and states[0] not in ENDED:
            state = DEPLOYING
        else:
            state = LIVE if live else FAILED
        return Status(
            platform="render",
            name=self._name,
            service=self._service["id"],
            state=state,
            detail="suspended" if state == STOPPED else f"newest deploy {states[0]}" if states else "never deployed",
            url=address(self._service),
            artifact=artifact(live) if live else None,
            deploys=[
                Deploy(
                    revision=deploy["id"],
                    state=str(deploy["status"]),
                    time=str(deploy.get("createdAt", "")),
                    artifact=artifact(deploy),
                )
                for deploy in deploys
            ],
        )

    def logs(self, tail: int, *, follow: bool) -> Iterator[Line]:
        """See :class:`~trimaran.operate.service.Service`."""
        seen: deque[str] = deque(maxlen=2000)
        newest = ""
        for entry in self._api.logs(self._service, tail):
            seen.append(_key(entry))
            newest = str(entry["timestamp"])
            yield _line(entry)
        while follow:
            time.sleep(FOLLOW_S)
            for entry in self._api.logs_since(self._service, newest):
                if _key(entry) not in seen:
                    seen.append(_key(entry))
                    newest = str(entry["timestamp"])
                    yield _line(entry)

    def rollback(self, to: ledger.Entry | None, *, wait: bool | None, tell: Callable[[ledger.Entry], None]) -> None:
        """See :class:`~trimaran.operate.service.Service`."""
        if to is not None and not to.revision:
            raise ConfigError(f"the ledger has no deploy's id for number {to.number}; nothing to return to")
        revision = to.revision if to else None
        on_render.return_to(self._name, revision, wait=wait is not False, tell=tell, restores=to)


def _key(entry: dict[str, Any]) -> str:
    return str(entry.get("id") or f"{entry['timestamp']} {entry['message']}")


def _line(entry: dict[str, Any]) -> Line:
    labels: list[dict[str, Any]] = entry.get("labels") or []
    source = next((str(label.get("value", "")) for label in labels if label.get("name") == "instance"), "")
    return Line(str(entry["timestamp"]), source, str(entry["message"]))
