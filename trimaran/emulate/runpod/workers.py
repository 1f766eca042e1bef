"""Real workers of a local control plane: processes that run the real SDK, replaced when they end."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import click

from serve.errors import ConfigError
from trimaran.emulate.runpod.plane import Plane

FINAL_STATUSES = {2: "a setting is wrong", 3: "the model cannot be loaded"}
"""Exit statuses that another start would only repeat."""

REPLACE_AFTER_S = 1.0
END_S = 30.0


def find_handler(given: Path | None) -> Path:
    """The worker's entry point: ``given``, else the checkout's own.

    Raises:
        ConfigError: there is none.
    """
    place = Path("deploy", "runpod", "handler.py")
    choices = [given] if given else [Path.cwd() / place, Path(__file__).parents[3] / place]
    for choice in choices:
        if choice.is_file():
            return choice.resolve()
    raise ConfigError(f"there is no {choices[0]}: run this in a checkout of Trimaran, or name the file with --handler")


class Crew:
    """A number of workers, each replaced when it ends.

    Args:
        plane: What they work for.
        url: Where it listens.
        handler: The Python file that each runs.
        environment: Added to that of this process.
    """

    def __init__(self, plane: Plane, url: str, handler: Path, environment: Mapping[str, str]) -> None:
        self._plane = plane
        self._url = url
        self._handler = handler
        self._environment = environment
        self._names = (f"worker-{number}" for number in itertools.count(1))

    async def work(self, num_workers: int) -> int:
        """Keep the workers running until cancelled, or until one cannot start; return its exit status then."""
        if num_workers == 0:
            await asyncio.Event().wait()
        tasks = {asyncio.create_task(self._keep_one()) for _ in range(num_workers)}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_one(self) -> int:
        while True:
            name = next(self._names)
            status = await self._run(name)
            self._plane.board.lost(name)
            if status in FINAL_STATUSES:
                click.echo(f"{name} ended with status {status}: {FINAL_STATUSES[status]} (see above)", err=True)
                return status
            click.echo(f"{name} ended with status {status}; another takes its place", err=True)
            await asyncio.sleep(REPLACE_AFTER_S)

    async def _run(self, name: str) -> int:
        environment = {**os.environ, **self._environment, **self._plane.worker_environment(self._url, name)}
        command = (sys.executable, "-u", str(self._handler))
        # A session of its own: Ctrl-C is for us, and whatever the worker started ends with it.
        process = await asyncio.create_subprocess_exec(*command, env=environment, start_new_session=True)
        try:
            return await process.wait()
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), END_S)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
