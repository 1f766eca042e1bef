"""A deploy of ``deploy/modal/app.py`` to the emulator, with the real ``modal`` command, and its containers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from modal_proto import api_pb2 as pb

from trimaran.emulate.modal.container import Container
from trimaran.emulate.modal.service import Emulator
from trimaran.emulate.modal.session import ADAPTER, start, wait_until_ready

ROOT = Path(__file__).parents[1]
KEY = "sk-test"
SLOW = "from serve.engine import echo; echo.EchoEngine.__init__.__kwdefaults__['step_s'] = {step_s}"


def modal_deploy(emulator: Emulator, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command; whether it succeeds is the test's to say."""
    defaults = {"SERVE_ENGINE": "echo", "SERVE_API_KEYS": KEY, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    given = emulator.client_environment() | defaults | environment
    return subprocess.run(
        [sys.executable, "-m", "modal", "deploy", str(ADAPTER)],
        cwd=ROOT,
        env={name: value for name, value in given.items() if value},
        capture_output=True,
        text=True,
        timeout=120,
    )


@dataclass(frozen=True, slots=True)
class Deployed:
    """What a deploy has created."""

    emulator: Emulator
    output: str

    @property
    def name(self) -> str:
        (name,) = self.published.function_ids
        return name

    @property
    def published(self) -> pb.AppPublishRequest:
        assert self.emulator.published is not None
        return self.emulator.published

    @property
    def variants(self) -> list[pb.Function]:
        """The one function's definitions, one for each GPU."""
        return self.emulator.variants(self.emulator.function_id(self.name))

    @property
    def function(self) -> pb.Function:
        return self.variants[0]

    @property
    def variables(self) -> list[dict[str, str]]:
        """What each of its secrets puts into the environment, in order."""
        return [self.emulator.variables(secret_id) for secret_id in self.function.secret_ids]

    @property
    def image_steps(self) -> list[str]:
        """Every command of its image, from the base on."""
        return [step for layer in self.emulator.layers(self.function.image_id) for step in layer.dockerfile_commands]

    @property
    def files(self) -> set[str]:
        """Paths that its mounts bring."""
        mounts = self.emulator.mounts
        return {file.filename for mount in self.function.mount_ids for file in mounts[mount]}

    @contextmanager
    def container(self, *, wait: bool = True, **environment: str) -> Iterator[Container]:
        """One container, ready if ``wait``; ended as Modal ends it."""
        container = start(self.emulator, **environment)
        try:
            if wait:
                wait_until_ready(container, KEY)
            yield container
        finally:
            container.stop()


@contextmanager
def deployed(**environment: str) -> Iterator[Deployed]:
    """A successful deploy to an account of its own."""
    with Emulator() as emulator:
        done = modal_deploy(emulator, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Deployed(emulator, done.stdout + done.stderr)


def volume_ids(emulator: Emulator) -> dict[str, str]:
    """Of all Volumes, by name."""
    return {made.deployment_name: volume_id for volume_id, made in emulator.volumes.items()}


def client(container: Container, **options: Any) -> httpx.Client:
    """An HTTP client with the key."""
    return httpx.Client(base_url=container.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60, **options)
