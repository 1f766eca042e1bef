"""``trimaran deploy ... --verify``: a good deploy is kept, a bad one is taken back, and the ledger has both.

The platforms are stand-ins; what is verified is a real server, behind the address that they give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from click.testing import CliRunner, Result
from fake_render import KEY as RENDER_KEY
from fake_render import FakeRender, serving_render
from fake_runpod import KEY as RUNPOD_KEY
from fake_runpod import FakeRunpodApi, serving_runpod_api
from fronts import Stage, in_front
from support import Served, serving

from trimaran import ledger
from trimaran.cli import main
from trimaran.deploy import on_render, on_runpod

GOOD, BAD = (f"docker.io/me/trimaran@sha256:{digit * 64}" for digit in "12")
KEY = "sk-verify"
BASE = ("--name", "chat", "--env", "SERVE_ENGINE=echo")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """With the key of the tests, and with the one that Render's stand-in generates."""
    with serving(api_keys=(KEY, "generated")) as served:
        yield served


@pytest.fixture
def render(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeRender, Stage]]:
    monkeypatch.setattr(on_render, "POLL_S", 0.0)
    with serving_render() as fake, ExitStack() as stack:
        monkeypatch.setenv("RENDER_API_KEY", RENDER_KEY)
        monkeypatch.setenv("RENDER_API_URL", fake.url)
        stage = Stage(served.app, lambda: live(fake), lambda made: made["image"]["ref"] == BAD)
        fake.address = stack.enter_context(in_front(served, lambda _: stage))
        yield fake, stage


@pytest.fixture
def runpod(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRunpodApi]:
    monkeypatch.setattr(on_runpod, "POLL_S", 0.0)
    with serving_runpod_api() as fake, ExitStack() as stack:
        monkeypatch.setenv("RUNPOD_API_KEY", RUNPOD_KEY)
        monkeypatch.setenv("RUNPOD_API_URL", fake.url)
        stage = Stage(served.app, lambda: fake.endpoints["ep0"]["image"], lambda image: image == BAD, RUNPOD_KEY)
        fake.base = stack.enter_context(in_front(served, lambda _: stage))
        yield fake


def live(fake: FakeRender) -> dict[str, object]:
    return dict(next(made for made in fake.deploys["srv-0"] if made["status"] == "live"), asked=0)


def run(*arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == status, (done.output, done.exception)
    for secret in (RENDER_KEY, RUNPOD_KEY, KEY):
        assert secret not in done.output
    return done


def deploy(platform: str, image: str, *more: str, status: int = 0) -> Result:
    return run("deploy", platform, *BASE, "--image", image, *more, status=status)


def noted() -> list[tuple[str, str, str | None, int | None]]:
    return [(entry.action, entry.result, entry.verify, entry.restores) for entry in ledger.read()[0]]


def test_good_deploy_is_verified_and_the_history_says_so(render):
    fake, _ = render
    done = deploy("render", GOOD, "--verify", "--json")
    shown = json.loads(done.stdout)
    assert (shown["result"], shown["verify"], shown["rolled_back"]) == ("live", "passed", False)
    assert (shown["url"], shown["revision"], shown["artifact"]) == (fake.address, "dep-0", GOOD)
    statuses = {check["name"]: check["status"] for check in shown["checks"]}
    assert (statuses["stream"], statuses["keys"], statuses["golden tokens"]) == ("passed", "passed", "skipped")
    assert "ok       keys" in done.stderr
    assert noted() == [("deploy", "live", "passed", None)]
    assert run("history").stdout.splitlines()[-1].endswith("passed")


def test_bad_deploy_gives_way_to_the_one_before_with_its_variables_and_its_plan(render, monkeypatch):
    fake, _ = render
    monkeypatch.setenv("SERVE_API_KEYS", KEY)
    deploy("render", GOOD, "--env", "SERVE_MAX_QUEUE=5")
    fake.variables["srv-0"]["ADDED_BY_HAND"] = "1"
    variables, details = dict(fake.variables["srv-0"]), dict(fake.services["srv-0"]["serviceDetails"])
    more = (
        "--env",
        "SERVE_MAX_QUEUE=9",
        "--env",
        "SERVE_MAX_BODY_BYTES=99999",
        "--plan",
        "pro",
        "--shutdown-delay",
        "60",
    )
    done = deploy("render", BAD, *more, "--verify", status=5)
    assert "FAILED   stream: a stream was answered with 500" in done.stderr
    assert f"deploy dep-0 ({GOOD}) runs again" in done.stderr
    assert done.stdout == ""
    assert live(fake)["image"] == {"ref": GOOD}
    assert fake.variables["srv-0"] == variables
    assert fake.services["srv-0"]["serviceDetails"] == details
    assert fake.services["srv-0"]["imagePath"] == GOOD
    assert noted() == [
        ("deploy", "live", None, None),
        ("deploy", "live", "failed", None),
        ("rollback", "live", None, 1),
    ]
    assert "verify: stream: a stream was answered with 500" in run("history").stdout
    assert "number 2 failed its verification" in run("rollback", "render", "2", "--dry-run").stderr


def test_deploy_that_never_ran_gives_the_variables_back_and_starts_nothing(render):
    fake, _ = render
    deploy("render", GOOD)
    variables = dict(fake.variables["srv-0"])
    fake.stages = ["update_failed"]
    done = deploy("render", BAD, "--env", "SERVE_MAX_QUEUE=9", "--verify", "--json", status=5)
    shown = json.loads(done.stdout)
    assert (shown["result"], shown["verify"], shown["rolled_back"]) == ("failed", "failed", True)
    assert (shown["rollback"]["revision"], shown["rollback"]["restores"]) == ("dep-0", 1)
    assert [made["status"] for made in fake.deploys["srv-0"]] == ["update_failed", "live"]
    assert fake.variables["srv-0"] == variables


def test_first_deploy_that_fails_is_left_and_the_remedy_is_told(render):
    done = deploy("render", BAD, "--verify", status=6)
    assert "Not rolled back: this was the first deploy of chat" in done.stderr
    assert "trimaran deploy render delete --name chat" in done.stderr
    assert noted() == [("deploy", "live", "failed", None)]
    gone = json.loads(run("deploy", "render", "delete", "--name", "chat", "--yes", "--json").stdout)
    assert (gone["action"], gone["result"], gone["service"]) == ("delete", "deleted", "srv-0")


def test_rollback_that_is_refused_is_told_and_noted(render):
    fake, _ = render
    deploy("render", GOOD)
    fake.refuses = {"rollback"}
    done = deploy("render", BAD, "--verify", "--json", status=6)
    assert "the rollback failed: Render answered 500" in done.stderr
    assert "What runs now: trimaran status render --name chat" in done.stderr
    shown = json.loads(done.stdout)
    assert (shown["rolled_back"], shown["rollback"]["result"]) == (False, "failed")
    assert noted()[1:] == [("deploy", "live", "failed", None), ("rollback", "failed", None, 1)]


def test_old_process_that_still_answers_proves_nothing(render):
    _, stage = render
    deploy("render", GOOD)
    stage.never_restarts = True
    done = deploy("render", GOOD, "--verify", "--verify-wait", "0", status=5)
    assert "FAILED   ready" in done.stderr
    assert "what ran before the deploy still answers" in done.stderr


def test_deploy_without_verify_fails_as_ever(render):
    fake, _ = render
    fake.stages = ["update_failed"]
    done = deploy("render", GOOD, "--json", status=1)
    shown = json.loads(done.stdout)
    assert (shown["result"], shown["verify"], shown["rolled_back"]) == ("failed", None, False)
    assert "ended as update_failed" in shown["error"]


def test_wrong_proof_is_refused_before_anything_is_called(render, runpod, tmp_path):
    fake, _ = render
    for more in (("--verify-reference", str(tmp_path / "none.json")), ("--verify", "--verify-header", "nonsense")):
        deploy("render", GOOD, *more, status=2)
    assert not [method for method, *_ in fake.requests if method != "GET"]
    http = ("--mode", "http", "--api-keys-secret", "ours")
    assert "TRIMARAN_VERIFY_KEY" in deploy("runpod", GOOD, *http, "--verify", status=2).stderr
    assert not runpod.endpoints
    assert noted() == []


def test_runpods_load_balancer_is_asked_with_both_keys_and_taken_back_whole(runpod, monkeypatch):
    monkeypatch.setenv("SERVE_API_KEYS", KEY)
    http = ("--mode", "http", "--api-keys-secret", "ours")
    done = deploy("runpod", GOOD, *http, "--verify")
    assert done.stdout == f"{runpod.base}/v1\n"
    assert "routes refuse no key and a wrong key" in done.stderr
    before = json.loads(json.dumps(runpod.endpoints["ep0"]))
    assert noted() == [("deploy", "live", "passed", None)]

    more = ("--env", "SERVE_MAX_QUEUE=9", "--max", "5", "--gpu", "ADA_24")
    done = deploy("runpod", BAD, *http, *more, "--verify", "--json", status=5)
    shown = json.loads(done.stdout)
    assert (shown["verify"], shown["rolled_back"], shown["rollback"]["restores"]) == ("failed", True, 1)
    assert runpod.endpoints["ep0"] == before
    assert noted()[1:] == [("deploy", "live", "failed", None), ("rollback", "sent", None, 1)]

    runpod.refuses = {"PATCH"}
    assert "not today" in deploy("runpod", BAD, *http, "--verify", status=1).stderr  # nothing changed
    assert noted()[3:] == [("deploy", "failed", None, None)]


def test_runpods_endpoint_that_did_not_change_has_nothing_to_return_to(runpod):
    deploy("runpod", BAD, "--mode", "http")
    done = deploy("runpod", BAD, "--mode", "http", "--verify", status=6)
    assert "Not rolled back: this deploy changed nothing" in done.stderr
    assert "trimaran deploy runpod delete --id ep0" in done.stderr


def test_deploy_waits_until_workers_of_the_version_before_are_gone(runpod, monkeypatch):
    monkeypatch.setattr(on_runpod, "STALE_S", 0.05)
    monkeypatch.setenv("SERVE_API_KEYS", KEY)
    runpod.workers.append({"id": "w0", "status": "RUNNING", "isStale": True})
    done = deploy("runpod", GOOD, "--mode", "http", "--api-keys-secret", "ours", "--verify")
    assert "IDLE; 1 of the version before" in done.stderr
    assert "answers may be theirs" in done.stderr


def test_rollback_and_delete_answer_with_one_object(render, runpod):
    for platform in ("render", "runpod"):
        deploy(platform, GOOD)
        deploy(platform, BAD)
        shown = json.loads(run("rollback", platform, "1", "--json").stdout)
        assert (shown["platform"], shown["action"], shown["restores"]) == (platform, "rollback", 1)
        assert shown["artifact"] == GOOD
        again = json.loads(run("deploy", platform, "rollback", "--name", "chat", "--json").stdout)
        assert again.keys() == shown.keys()
        assert again["artifact"] == BAD
        gone = json.loads(run("deploy", platform, "delete", "--name", "chat", "--yes", "--json").stdout)
        assert (gone.keys(), gone["result"]) == (shown.keys(), "deleted")
