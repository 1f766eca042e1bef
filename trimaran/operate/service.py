"""One service on one platform, and what every platform can say and do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from serve.errors import ConfigError
from trimaran import ledger

PLATFORMS = ("modal", "render", "runpod")
LIVE, DEPLOYING, FAILED, STOPPED = "live", "deploying", "failed", "stopped"
"""Requests are answered, perhaps after a cold start; a new version is on its way; none runs; it was switched off."""

DEFAULT_NAME = "trimaran"
"""What ``trimaran deploy render`` and ``runpod`` call a service that was given no name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deploy:
    """One deploy as the platform tells it; ``state`` in its own words."""

    revision: str
    state: str
    time: str = ""
    artifact: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A service now.  ``running`` counts containers or workers, None where the platform does not tell."""

    platform: str
    name: str
    service: str
    state: str
    detail: str
    url: str | None = None
    artifact: str | None = None
    running: int | None = None
    deploys: list[Deploy] = field(default_factory=list[Deploy])


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a log: the platform's time, the instance that wrote it where that is known, and the text."""

    time: str
    source: str
    text: str


class Service(Protocol):
    """Every method blocks; ``ServeError`` has the platform's words, ``ConfigError`` is for what the user can mend."""

    def status(self) -> Status:
        """How it is now, with its latest deploys, newest first."""
        ...

    def logs(self, tail: int, *, follow: bool) -> Iterator[Line]:
        """The last ``tail`` lines, oldest first; then, with ``follow``, those that come, for ever."""
        ...

    def rollback(self, to: ledger.Entry | None, *, wait: bool | None, tell: Callable[[ledger.Entry], None]) -> None:
        """Return to an entry of the ledger, or to what the platform calls the version before; noted in the ledger.

        ``wait`` until it is live; None: where that comes by itself (on RunPod a worker starts with the next request).
        ``tell`` is called with the ledger's entry.
        """
        ...


def open_service(platform: str, name: str, service_id: str | None = None) -> Service:
    """The service of that name, with the credentials of this environment.

    Args:
        platform: One of ``PLATFORMS``.
        name: As it was deployed.
        service_id: Where the platform lets several have one name.

    Raises:
        ConfigError: the credentials are missing.
    """
    if platform == "render":
        from trimaran.operate.render import RenderService  # noqa: PLC0415

        return RenderService(name)
    if platform == "runpod":
        from trimaran.operate.runpod import RunpodService  # noqa: PLC0415

        return RunpodService(name, service_id)
    from trimaran.operate.modal import ModalService  # noqa: PLC0415

    return ModalService(name)


def choose_name(platform: str, name: str | None, entries: list[ledger.Entry]) -> str:
    """``name``, or the only one that the ledger knows of there, or the deploy commands' default.

    Raises:
        ConfigError: there are several, or none and no default.
    """
    if name:
        return name
    known = sorted({entry.name for entry in entries if entry.platform == platform})
    if len(known) > 1:
        raise ConfigError(f"name one with --name; the ledger knows of these on {platform}: {', '.join(known)}")
    if known:
        return known[0]
    if platform == "modal":
        raise ConfigError(f"name the app with --name; the ledger {ledger.path()} knows of none on modal")
    return DEFAULT_NAME
