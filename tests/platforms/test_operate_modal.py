"""``trimaran deploy``, ``rollback``, ``status`` and ``logs`` of Modal: its real command against the emulator."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result
from modal_local import KEY as MODAL_KEY
from modal_local import modal_deploy

from trimaran import ledger
from trimaran.cli import main
from trimaran.emulate.modal.service import Emulator
from trimaran.emulate.modal.session import start, wait_until_ready


def run(*arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == status, (done.output, done.exception)
    return done


def entries() -> list[ledger.Entry]:
    return ledger.read()[0]


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    with Emulator() as account:
        settings: dict[str, Any] = {"SERVE_ENGINE": "echo", "SERVE_API_KEYS": MODAL_KEY, "HF_HUB_OFFLINE": "1"}
        for variable, value in (account.client_environment() | settings).items():
            monkeypatch.setenv(variable, value)
        yield account


@pytest.mark.timeout(150)  # many starts of Modal's command, each over a second
def test_modal_is_deployed_and_rolled_back_with_its_own_command(account, monkeypatch):
    """No container runs, so that a verified deploy fails: at first it stays, then it gives way to the one before."""
    done = run("deploy", "modal", "--verify", "--verify-wait", "0", status=6)
    assert "this was the first deploy of echo" in done.stderr
    assert "modal app stop echo" in done.stderr
    first = account.published
    monkeypatch.setenv("SERVE_MAX_QUEUE", "7")
    shown = json.loads(run("deploy", "modal", "--verify", "--verify-wait", "0", "--json", status=5).stdout)
    assert account.published is first
    assert (shown["revision"], shown["verify"], shown["rolled_back"]) == ("v2", "failed", True)
    assert shown["rollback"]["revision"] == "v3"
    done = run("rollback", "modal", "2")
    assert account.published is not first
    assert done.stdout == account.url + "\n"
    made = entries()
    assert [(entry.name, entry.revision, entry.result, entry.restores) for entry in made] == [
        ("echo", "v1", "live", None),
        ("echo", "v2", "live", None),
        ("echo", "v3", "live", 1),
        ("echo", "v4", "live", 2),
    ]
    assert made[0].configuration != made[1].configuration
    assert made[3].configuration == made[1].configuration
    assert MODAL_KEY not in ledger.path().read_text()
    assert "no number 9 of echo" in run("rollback", "modal", "9", status=2).stderr


@pytest.mark.timeout(150)
def test_modals_status_and_logs_are_those_of_its_containers(account):
    deployed = modal_deploy(account)
    assert deployed.returncode == 0, deployed.stderr
    container = start(account)
    try:
        wait_until_ready(container, MODAL_KEY)
        (shown,) = json.loads(run("status", "modal", "--name", "echo", "--json").stdout)
        assert (shown["state"], shown["running"], shown["deploys"][0]["revision"]) == ("live", 1, "v1")
        last = json.loads(run("logs", "modal", "--name", "echo", "--tail", "1", "--json").stdout)
        assert last["time"].startswith("20")
        assert "Ready after" in last["text"]
        assert follows(container.folder / "log") == "a line that comes"
    finally:
        container.stop()
    assert "No App with name 'nowhere'" in run("status", "modal", "--name", "nowhere", status=2).stderr


def follows(log: Any) -> str:
    """What ``logs --follow`` shows of a line that is written while it runs."""
    from trimaran.operate.modal import ModalService

    lines = ModalService("echo").logs(1, follow=True)
    next(lines)
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.1):
            with log.open("a") as file:
                file.write("a line that comes\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        return next(line.text for line in lines if line.text)
    finally:
        stop.set()
        writer.join()


def test_modal_without_an_account_or_with_an_unfit_option_is_refused(monkeypatch):
    monkeypatch.setenv("MODAL_CONFIG_PATH", os.devnull)
    assert "modal setup" in run("status", "modal", "--name", "chat", status=2).stderr
    monkeypatch.setenv("SERVE_ENGINE", "echo")
    assert "set MODAL_ENVIRONMENT" in run("deploy", "modal", "--env=prod", status=2).stderr
    monkeypatch.setenv("SERVE_MODEL", "./nowhere")
    monkeypatch.setenv("SERVE_ENGINE", "transformers")
    assert run("deploy", "modal", "--name", "chat", status=1).stderr
    assert "TRIMARAN_VERIFY_KEY" in run("deploy", "modal", "--name", "chat", "--verify", status=2).stderr
    (entry,) = entries()
    assert (entry.result, entry.name) == ("failed", "chat")
