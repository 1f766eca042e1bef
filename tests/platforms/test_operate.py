"""``trimaran history``, ``rollback``, ``status`` and ``logs``: the same commands against every platform's stand-in."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result
from fake_render import KEY as RENDER_KEY
from fake_render import FakeRender, serving_render
from fake_runpod import KEY as RUNPOD_KEY
from fake_runpod import FakeRunpodApi, serving_runpod_api

from trimaran import ledger
from trimaran.cli import main
from trimaran.deploy import on_render
from trimaran.operate import render as render_service
from trimaran.operate.render import RenderService
from trimaran.operate.runpod import RunpodService

ONE, TWO = (f"docker.io/me/trimaran@sha256:{digit * 64}" for digit in "12")


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRender]:
    monkeypatch.setattr(on_render, "POLL_S", 0.0)
    with serving_render() as fake:
        monkeypatch.setenv("RENDER_API_KEY", RENDER_KEY)
        monkeypatch.setenv("RENDER_API_URL", fake.url)
        yield fake


@pytest.fixture
def runpod(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRunpodApi]:
    with serving_runpod_api() as fake:
        monkeypatch.setenv("RUNPOD_API_KEY", RUNPOD_KEY)
        monkeypatch.setenv("RUNPOD_API_URL", fake.url)
        yield fake


def run(*arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == status, (done.output, done.exception)
    return done


def deploy(platform: str, image: str, *more: str, name: str = "chat", status: int = 0) -> Result:
    return run("deploy", platform, "--name", name, "--image", image, "--env", "SERVE_ENGINE=echo", *more, status=status)


def entries() -> list[ledger.Entry]:
    return ledger.read()[0]


@pytest.mark.parametrize("platform", ["render", "runpod"])
def test_rollback_to_a_number_of_history(platform, request, monkeypatch):
    fake = request.getfixturevalue(platform)
    monkeypatch.setenv("SERVE_API_KEYS", "sk-not-in-the-ledger")
    deploy(platform, ONE)
    deploy(platform, TWO)
    deploy(platform, TWO.replace("2", "3"))
    listed = json.loads(run("history", platform, "--json").stdout)
    assert [(entry["number"], entry["artifact"]) for entry in listed[1:]] == [(2, TWO), (1, ONE)]
    assert len({entry["configuration"] for entry in listed}) == 3
    assert "sk-not-in-the-ledger" not in ledger.path().read_text()

    assert "Dry run" in run("rollback", platform, "1", "--dry-run").stderr
    assert running_image(fake) != ONE
    done = run("rollback", platform, "1")
    assert running_image(fake) == ONE
    assert f"configuration was another then ({listed[2]['configuration']}" in done.stderr
    back = entries()[-1]
    assert (back.action, back.restores, back.artifact, back.number) == ("rollback", 1, ONE, 4)
    assert "rollback to 1" in run("history").stdout


def running_image(fake: FakeRender | FakeRunpodApi) -> str:
    if isinstance(fake, FakeRender):
        return next(made["image"]["ref"] for made in fake.deploys["srv-0"] if made["status"] == "live")
    return fake.endpoints["ep0"]["image"]


@pytest.mark.parametrize("platform", ["render", "runpod"])
def test_rollback_without_a_number_is_the_platforms_own(platform, request):
    fake = request.getfixturevalue(platform)
    deploy(platform, ONE)
    deploy(platform, TWO)
    ledger.path().unlink()  # deployed from another machine
    run("rollback", platform, "--name", "chat")
    assert running_image(fake) == ONE


def test_rollback_refuses_what_never_ran_or_is_not_there(render):
    deploy("render", ONE)
    render.stages = ["update_failed"]
    deploy("render", TWO, status=1)
    failed = entries()[-1]
    assert (failed.result, failed.revision, failed.artifact) == ("failed", "dep-1", TWO)
    assert "number 2 of chat on render failed and never ran" in run("rollback", "render", "2", status=2).stderr
    assert "no number 9 of chat on render; there are: 1" in run("rollback", "render", "9", status=2).stderr
    assert "ended as update_failed" in run("rollback", "render", "1", status=1).stderr
    assert entries()[-1].result == "failed"


def test_rollback_of_variables_only_is_refused_on_runpod(runpod):
    deploy("runpod", ONE)
    deploy("runpod", ONE, "--env", "SERVE_MAX_QUEUE=9")
    refused = run("rollback", "runpod", "1", status=2).stderr
    assert "is of the image that runs now" in refused
    assert "variables or sizes were others" in refused


def test_names_come_from_the_ledger(render):
    assert "no service named 'trimaran'" in run("status", "render", status=2).stderr
    deploy("render", ONE, name="only")
    assert "only" in run("status", "render").stdout
    deploy("render", ONE, name="other")
    assert "--name" in run("status", "render", status=2).stderr
    assert "only, other" in run("rollback", "render", status=2).stderr
    assert "name the app" in run("logs", "modal", status=2).stderr


def test_status_has_one_shape_and_says_what_does_not_answer(render, runpod, monkeypatch):
    assert "name a platform" in run("status", status=2).stderr
    deploy("render", ONE)
    deploy("runpod", TWO)
    shown = json.loads(run("status", "--json").stdout)
    assert [(one["platform"], one["state"], one["artifact"]) for one in shown] == [
        ("render", "live", ONE),
        ("runpod", "live", TWO),
    ]
    assert shown[0].keys() == shown[1].keys()
    assert shown[1]["running"] == 1
    assert "live (workers 0 to 3: 1 IDLE, 1 running)" in run("status", "runpod").stdout
    monkeypatch.delenv("RENDER_API_KEY")
    done = run("status", "--json", status=2)
    assert "set RENDER_API_KEY" in done.stderr
    assert [one["platform"] for one in json.loads(done.stdout)] == ["runpod"]


def test_status_tells_what_answers_nobody_by_its_exit_status(render, runpod):
    deploy("runpod", ONE, "--max", "0")
    assert "stopped" in run("status", "runpod", status=4).stdout
    runpod.endpoints["ep0"]["workers"]["max"] = 3
    runpod.workers.append({"id": "w0", "status": "RUNNING", "isStale": True})
    assert "deploying" in run("status", "runpod").stdout
    runpod.workers[:] = [{"id": "w1", "status": "UNHEALTHY", "isStale": False}]
    assert "failed" in run("status", "runpod", status=4).stdout
    runpod.failures = [500, 500, 500, 500]
    assert "RunPod answered 500" in run("status", "runpod", status=1).stderr

    render.stages = ["update_failed"]
    deploy("render", ONE, status=1)
    assert "failed" in run("status", "render", status=4).stdout
    render.services["srv-0"]["suspended"] = "suspended"
    assert "stopped (suspended)" in run("status", "render", status=4).stdout


def test_logs_page_back_through_more_than_one_answer(render):
    deploy("render", ONE)
    render.lines.clear()
    for number in range(10, 260):
        render.lines.append({"id": f"l{number}", "timestamp": f"t{number:04}", "message": f"m{number}", "labels": []})
    shown = run("logs", "render", "--tail", "230").stdout.splitlines()
    assert shown == [f"t{number:04}  m{number}" for number in range(30, 260)]


def test_logs_follow_render_without_gaps_or_repetitions(render, monkeypatch):
    monkeypatch.setattr(render_service, "FOLLOW_S", 0.02)
    deploy("render", ONE)
    lines = RenderService("chat").logs(2, follow=True)
    seen = [next(lines).text, next(lines).text]
    for number in range(3, 8):
        render.say(f"line {number}")
        seen.append(next(lines).text)
    assert seen == [f"line {number}" for number in range(1, 8)]


def test_logs_follow_runpods_workers_across_broken_streams(runpod, monkeypatch):
    from trimaran.operate import runpod as service

    monkeypatch.setattr(service, "RETRY_S", 0.02)
    monkeypatch.setattr(service, "RELIST_S", 0.1)
    deploy("runpod", ONE)
    lines = RunpodService("chat").logs(10, follow=True)
    seen = [next(lines).text]
    for number in range(4):
        runpod.lines.append(f"line {number}")
        seen.append(next(lines).text)
    assert seen == ["Ready after 3 s", *(f"line {number}" for number in range(4))]
    runpod.workers.append({"id": "w2", "status": "RUNNING", "isStale": False})
    new = list(itertools.islice(lines, 5))
    assert {line.source for line in new} == {"w2"}
    runpod.workers.clear()  # the threads end


def test_follow_ends_with_ctrl_c(render):
    deploy("render", ONE)
    command = [sys.executable, "-m", "trimaran.cli", "logs", "render", "--follow", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout
    assert [json.loads(process.stdout.readline())["text"] for _ in range(3)] == ["line 0", "line 1", "line 2"]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")
