"""``trimaran verify --redeploy``: real servers behind a switch, one of which is replaced while streams are open."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
from support import Running, running, serving

from trimaran.verify import redeploy
from trimaran.verify.outcome import Outcome
from trimaran.verify.redeploy import check_redeploy
from trimaran.verify.target import Target

SLOW = "from serve.engine.echo import EchoEngine\nEchoEngine.__init__.__kwdefaults__['step_s'] = 0.01"


class Switch:
    """Passes each new connection on to the port that stands in ``file``."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with closing(client), suppress(OSError):
            server = socket.create_connection(("127.0.0.1", int(self.file.read_text())))
            with closing(server):
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def port(server: Running) -> str:
    return server.url.rpartition(":")[2]


def switch(file: Path, to: str | int) -> str:
    """A command that changes the file at once: no reader sees it empty."""
    return f"echo {to} > {file}.new; mv {file}.new {file}"


@contextmanager
def target_of(url: str) -> Iterator[Target]:
    with Target(url, "", 10) as target:
        target.model = "echo"
        yield target


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redeploy, "HELD_TOKENS", 80)
    monkeypatch.setattr(redeploy, "PROBE_S", 0.05)


def test_redeploy_that_drains_passes_and_one_that_kills_is_caught_and_named(tmp_path):
    """Of three servers the first is told to end as platforms do it, the second is killed before the third answers."""
    with ExitStack() as stack:
        first = stack.enter_context(running(before=SLOW))
        file = tmp_path / "port"
        file.write_text(port(first))  # it listens; the others are born later
        second, third = (stack.enter_context(running(before=SLOW)) for _ in range(2))
        with target_of(Switch(file).url) as target:
            drained = check_redeploy(target, f"{switch(file, port(second))}; kill {first.process.pid}", 10)
            assert drained.status == "passed", drained
            assert drained.details["held"] >= 1
            assert first.process.wait(10) == 0

            stopped = f"kill -9 {second.process.pid}; sleep 0.3; {switch(file, port(third))}"
            killed = check_redeploy(target, stopped, 1)
    assert killed.status == "failed"
    assert "streams were cut (RemoteProtocolError after" in killed.message
    assert "the old server does not drain" in killed.message
    assert "requests were refused otherwise than by 503 with Retry-After" in killed.message
    assert not drained.details["cut"]


def test_command_that_fails_or_changes_nothing_is_named():
    with serving() as served, target_of(served.url) as target:
        assert "the same process still answers" in check_redeploy(target, "true", 0.1).message
        assert "the command ended with status 3" in check_redeploy(target, "exit 3", 0.1).message
        target.model = "another"
        assert "streams could not be held open" in check_redeploy(target, "true", 0.1).message


def test_drain_that_is_too_short_is_told_from_a_cut_connection(tmp_path):
    with running(before=SLOW, SERVE_DRAIN_TIMEOUT_S="0") as old, serving() as new:
        file = tmp_path / "port"
        file.write_text(port(old))
        with target_of(Switch(file).url) as target:
            outcome: Outcome = check_redeploy(target, f"{switch(file, new.port)}; kill {old.process.pid}", 10)
    assert outcome.status == "failed"
    assert "an error in its place" in outcome.message
