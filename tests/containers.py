"""The project's Dockerfile, built and run by the command-line tool that ``builders`` finds."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from support import eventually

ROOT = Path(__file__).parent.parent
HARDENED = ("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges")

KERNELS = "import json; from serve import kernels; print(json.dumps(sorted(p.name for p in kernels.FOLDER.iterdir())))"
"""What lies in the folder of the engine's kernels, for :meth:`Container.python`."""

MEASURED: list[tuple[str, str]] = []
"""What was measured on the way, for the summary at the end."""


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Note how long a step took."""
    began = time.perf_counter()
    yield
    MEASURED.append((what, f"{time.perf_counter() - began:.1f} s"))


def call(*command: str | Path, timeout_s: float = 60, **options: Any) -> str:
    """Run a command; its standard output.  Fails the test with both outputs when it does not end with 0."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, **options)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Tool:
    """What builds and runs: the beginnings of both commands, what each container needs here, the base image."""

    build: tuple[str, ...]
    run: tuple[str, ...]
    options: tuple[str, ...] = ()
    base: str | None = None
    environment: Mapping[str, str] | None = None

    def image(self, tag: str, arguments: Mapping[str, str], *, target: str = "", secret: Path | None = None) -> Image:
        """Build the Dockerfile; ``arguments`` are its build arguments, ``secret`` a file with a Hub token."""
        if self.base:
            arguments = {"BASE_IMAGE": self.base, **arguments}
        given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
        given += ["--target", target] if target else []
        given += ["--secret", f"id=HF_TOKEN,src={secret}"] if secret else []
        with measured(f"build {tag}"):
            call(*self.build, *given, "--tag", f"localhost/trimaran:{tag}", ROOT, timeout_s=1800, env=self.environment)
        image = Image(self, f"localhost/trimaran:{tag}")
        MEASURED.append((f"size {tag}", f"{image.num_bytes / 1e6:.0f} MB unpacked"))
        return image


@dataclass(frozen=True, slots=True)
class Image:
    """A built image."""

    tool: Tool
    name: str

    def inspect(self) -> dict[str, Any]:
        """What the builder recorded."""
        return json.loads(call(*self.tool.run, "image", "inspect", self.name))[0]

    def bill(self) -> Path:
        """Its bill of materials, as ``scripts/sbom.py`` writes it, below ``dist/sbom``."""
        path = ROOT / "dist" / "sbom" / f"trimaran-{self.name.rpartition(':')[2]}.cdx.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        runner, options = shlex.join(self.tool.run), shlex.join(self.tool.options)
        command = (
            sys.executable,
            ROOT / "scripts" / "sbom.py",
            self.name,
            f"--runner={runner}",
            f"--options={options}",
        )
        path.write_text(call(*command))
        return path

    @property
    def num_bytes(self) -> int:
        """Unpacked size, base image included."""
        return int(self.inspect()["Size"])

    def create(self, *command: str, options: Sequence[str] = (), **environment: str) -> Container:
        """Start a container; whoever calls removes it."""
        name = f"trimaran-{uuid.uuid4().hex[:12]}"
        given = [part for key, value in environment.items() for part in ("--env", f"{key}={value}")]
        call(
            *self.tool.run, "run", "--detach", "--name", name, *self.tool.options, *options, *given, self.name, *command
        )
        return Container(self.tool, name)

    @contextmanager
    def running(self, *command: str, options: Sequence[str] = HARDENED, **environment: str) -> Iterator[Container]:
        """A container without a network of its own; :meth:`Container.python` asks it from inside."""
        container = self.create(*command, options=("--network", "none", *options), **environment)
        try:
            yield container
        finally:
            container.remove()

    @contextmanager
    def serving(self, *command: str, options: Sequence[str] = HARDENED, **environment: str) -> Iterator[Served]:
        """A container whose server listens on this machine's loopback interface."""
        port = free_port()
        where = {"SERVE_HOST": "127.0.0.1", "PORT": str(port)}
        began = time.perf_counter()
        container = self.create(*command, options=("--network", "host", *options), **where, **environment)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                served = Served(container, client, began)
                eventually(lambda: served.answers() or not container.is_running, timeout_s=30)
                served.health_s = time.perf_counter() - began
                yield served
        finally:
            container.remove()


@dataclass(frozen=True, slots=True)
class Container:
    """A container that was started."""

    tool: Tool
    name: str

    def _state(self) -> dict[str, Any]:
        return json.loads(call(*self.tool.run, "container", "inspect", self.name))[0]["State"]

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return bool(self._state()["Running"])

    @property
    def log(self) -> str:
        """Everything that it has written."""
        done = subprocess.run([*self.tool.run, "logs", self.name], capture_output=True, text=True, timeout=30)
        return done.stdout + done.stderr

    def execute(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, with the container's environment and user."""
        given = [part for key, value in environment.items() for part in ("--env", f"{key}={value}")]
        return subprocess.run(
            [*self.tool.run, "exec", *given, self.name, *command], capture_output=True, text=True, timeout=60
        )

    def python(self, code: str, *arguments: str) -> Any:
        """Run Python inside; what it prints is JSON."""
        done = self.execute("python", "-c", code, *arguments)
        assert done.returncode == 0, f"{done.stderr}\n{self.log}"
        return json.loads(done.stdout)

    def terminate(self) -> None:
        """SIGTERM."""
        call(*self.tool.run, "kill", "--signal", "TERM", self.name)

    def stop(self, timeout_s: int = 10) -> int:
        """SIGTERM, and SIGKILL after ``timeout_s``; the exit status."""
        call(*self.tool.run, "stop", "--time", str(timeout_s), self.name, timeout_s=timeout_s + 30)
        return self.wait()

    def wait(self, timeout_s: float = 30) -> int:
        """The exit status, once it has ended."""
        eventually(lambda: not self.is_running, timeout_s)
        return int(self._state()["ExitCode"])

    def remove(self) -> None:
        """Kill it if need be."""
        subprocess.run([*self.tool.run, "rm", "--force", self.name], capture_output=True, timeout=60)


@dataclass(slots=True)
class Served:
    """A container that answers on loopback."""

    container: Container
    client: httpx.Client
    began: float
    health_s: float = field(default=0.0)

    def answers(self) -> bool:
        """Whether ``/health`` says 200."""
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Until ``/ready`` says 200."""
        eventually(lambda: self.client.get("/ready").status_code == 200, timeout_s)


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
