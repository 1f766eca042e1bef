"""An endpoint on RunPod Serverless."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from serve.errors import ConfigError, ServeError
from trimaran import ledger
from trimaran.deploy import on_runpod
from trimaran.operate.service import DEPLOYING, FAILED, LIVE, STOPPED, Deploy, Line, Status
from trimaran.platforms.runpod.endpoint import address, configuration, image_before

NUM_DEPLOYS = 5
QUIET_S = 2.0
"""The stream of logs stays open; after so long without a line, what there was has come."""

SILENT_S = 60.0
"""A followed stream that says nothing for so long is asked for anew: its connection may be gone."""

RELIST_S = 10.0
RETRY_S = 1.0
MAX_FAILURES = 5


class RunpodService:
    """By name, or by id where several have the name.

    Raises:
        ConfigError: there is no key, or no such endpoint.
    """

    def __init__(self, name: str, endpoint_id: str | None = None) -> None:
        self._api = on_runpod.open_api()
        self._endpoint = self._api.get(name, endpoint_id)
        self._id = str(self._endpoint["id"])
        self._name = name

    def status(self) -> Status:
        """See :class:`~trimaran.operate.service.Service`."""
        workers: list[dict[str, Any]] = self._api.workers(self._id)["workers"]
        scale = self._endpoint["workers"]
        fresh = [str(worker["status"]) for worker in workers if not worker["isStale"]]
        running = sum(status in {"RUNNING", "IDLE"} for status in fresh)
        if scale["max"] == 0:
            state = STOPPED
        elif len(fresh) < len(workers):
            state = DEPLOYING
        else:
            state = FAILED if fresh and set(fresh) == {"UNHEALTHY"} else LIVE
        counted = ", ".join(f"{fresh.count(status)} {status}" for status in sorted(set(fresh))) or "no worker now"
        return Status(
            platform="runpod",
            name=self._name,
            service=self._id,
            state=state,
            detail=f"workers {scale['min']} to {scale['max']}: {counted}",
            url=address(self._endpoint),
            artifact=self._endpoint.get("image"),
            running=running,
            deploys=[_deploy(release) for release in self._api.releases(self._id)[:NUM_DEPLOYS]],
        )

    def logs(self, tail: int, *, follow: bool) -> Iterator[Line]:
        """See :class:`~trimaran.operate.service.Service`.  ``tail`` counts for each worker."""
        if follow:
            yield from self._follow(tail)
            return
        workers = self._worker_ids()
        if not workers:
            click.echo("No worker runs now; RunPod keeps the logs of ended workers in its console.", err=True)
        for worker in workers:
            for entry in self._api.logs(self._id, worker, tail, QUIET_S):
                yield _line(worker, entry)

    def rollback(self, to: ledger.Entry | None, *, wait: bool | None, tell: Callable[[ledger.Entry], None]) -> None:
        """See :class:`~trimaran.operate.service.Service`.  RunPod has no rollback: the earlier image is set again."""
        current = str(self._endpoint.get("image") or "")
        image = to.artifact if to else image_before(self._api.releases(self._id), current)
        if to and not image:
            raise ConfigError(f"the ledger has no image for number {to.number}; nothing to return to")
        if to and image == current:
            now = ledger.fingerprint(configuration(self._endpoint))
            differs = "; its variables or sizes were others: deploy them again" if to.configuration != now else ""
            raise ConfigError(f"number {to.number} is of the image that runs now, {image}{differs}")
        on_runpod.return_to(self._api, self._endpoint, str(image), tell=tell, restores=to, wait=bool(wait))

    def _worker_ids(self) -> list[str]:
        return [str(worker["id"]) for worker in self._api.workers(self._id)["workers"]]

    def _follow(self, tail: int) -> Iterator[Line]:
        """Each worker's stream in a thread of its own; new workers are found within ``RELIST_S``."""
        lines: queue.Queue[Line | ServeError] = queue.Queue(1000)
        threads: dict[str, threading.Thread] = {}
        while True:
            for worker in self._worker_ids():
                if worker not in threads:
                    threads[worker] = threading.Thread(target=self._pump, args=(worker, tail, lines), daemon=True)
                    threads[worker].start()
            deadline = time.monotonic() + RELIST_S
            while (left := deadline - time.monotonic()) > 0:
                try:
                    line = lines.get(timeout=left)
                except queue.Empty:
                    break
                if isinstance(line, ServeError):
                    click.echo(f"Note: {line.message}", err=True)
                else:
                    yield line

    def _pump(self, worker: str, tail: int, lines: queue.Queue[Line | ServeError]) -> None:
        """One worker's lines until it is gone; goes on after a break where it had stopped."""
        last, failures = Line("", worker, ""), 0
        while failures < MAX_FAILURES:
            try:
                for entry in self._api.logs(self._id, worker, tail, SILENT_S, after=last.time):
                    failures, line = 0, _line(worker, entry)
                    if line != last:  # the line to go on from may come again
                        lines.put(line)
                    last = line
                if worker not in self._worker_ids():
                    return
            except ServeError as error:
                failures += 1
                if failures == MAX_FAILURES:
                    lines.put(ServeError(f"the logs of worker {worker} are given up: {error.message}"))
            time.sleep(RETRY_S)


def _deploy(release: dict[str, Any]) -> Deploy:
    changes: list[dict[str, Any]] = release.get("diff") or []
    fields = ", ".join(str(change["field"]) for change in changes) or "created"
    return Deploy(revision=str(release.get("version")), state=fields, time=str(release.get("createdAt", "")))


def _line(worker: str, entry: dict[str, Any]) -> Line:
    return Line(str(entry.get("ts", "")), worker, str(entry.get("line", "")))
