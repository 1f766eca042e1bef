"""``trimaran deploy render`` against a local control plane that reads every body with Render's own client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checkpoints import model_files
from click.testing import CliRunner, Result
from fake_hub import serving_hub
from fake_render import KEY, FakeRender, serving_render

from serve.errors import HubUnreachable
from trimaran.cli import main
from trimaran.deploy import on_render
from trimaran.plan import need
from trimaran.platforms.render.check import check_blueprint

ROOT = Path(__file__).parents[2]
IMAGE = "docker.io/me/trimaran@sha256:" + "a" * 64
TOKEN = "hf_" + "Q7x" * 12


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRender]:
    monkeypatch.setattr(on_render, "POLL_S", 0.0)
    monkeypatch.setattr(need, "weight_bytes", unreachable)
    monkeypatch.chdir(ROOT)
    with serving_render() as fake:
        monkeypatch.setenv("RENDER_API_KEY", KEY)
        monkeypatch.setenv("RENDER_API_URL", fake.url)
        yield fake


def unreachable(model: str, revision: str | None) -> int:
    raise HubUnreachable("no network in tests")


def run(*arguments: str, succeeds: bool = True) -> Result:
    done = CliRunner().invoke(main, ["deploy", "render", *arguments])
    assert (done.exit_code == 0) is succeeds, done.output
    return done


def test_deploy_creates_a_service_and_waits_until_it_is_live(fake: FakeRender, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = run("--name", "chat", "--image", IMAGE, "--model", "owner/name", "--plan", "pro plus")

    assert done.stdout == "https://chat.onrender.com\n"
    assert "live" in done.stderr
    assert TOKEN not in done.output
    details = fake.services["srv-0"]["serviceDetails"]
    assert (details["plan"], details["healthCheckPath"], details["maxShutdownDelaySeconds"]) == (
        "pro_plus",
        "/health",
        120,
    )
    assert fake.variables["srv-0"] == {
        "SERVE_MODEL": "owner/name",
        "SERVE_DRAIN_TIMEOUT_S": "110",
        "HF_TOKEN": TOKEN,
        "SERVE_API_KEYS": "generated",
    }


def test_deploy_from_a_repository_asks_for_cpu_wheels(fake: FakeRender) -> None:
    run("--repo", "https://github.com/me/mine", "--branch", "main", "--model", "owner/name", "--disk-gb", "20")
    assert fake.variables["srv-0"]["TORCH_INDEX_URL"].endswith("/whl/cpu")
    details = fake.services["srv-0"]["serviceDetails"]
    assert details["disk"] == {"name": "models", "mountPath": "/data", "sizeGB": 20}
    assert "maxShutdownDelaySeconds" not in details


def test_deploy_again_updates_and_keeps_what_it_does_not_name(fake: FakeRender) -> None:
    run("--image", IMAGE, "--model", "owner/name")
    fake.variables["srv-0"]["ADDED_BY_HAND"] = "1"
    run("--image", IMAGE.replace("a", "b"), "--model", "owner/other", "--plan", "pro")

    assert len(fake.services) == 1
    assert fake.services["srv-0"]["serviceDetails"]["plan"] == "pro"
    variables = fake.variables["srv-0"]
    assert (variables["SERVE_MODEL"], variables["ADDED_BY_HAND"]) == ("owner/other", "1")
    assert variables["SERVE_API_KEYS"] == "generated"
    assert [deploy["status"] for deploy in fake.deploys["srv-0"]] == ["live", "deactivated"]


def test_deploy_that_fails_says_so(fake: FakeRender) -> None:
    fake.stages = ["build_in_progress", "update_failed"]
    assert "ended as update_failed" in run("--image", IMAGE, "--model", "owner/name", succeeds=False).stderr


def test_rollback_returns_to_the_last_deploy_that_was_live(fake: FakeRender) -> None:
    run("--image", IMAGE, "--model", "owner/name")
    assert "no earlier deploy" in run("rollback", succeeds=False).stderr
    run("--image", "docker.io/me/other:1", "--model", "owner/name")
    run("rollback")
    assert fake.deploys["srv-0"][0]["image"]["ref"] == IMAGE
    run("rollback", "--to", "dep-1")
    assert fake.deploys["srv-0"][0]["image"]["ref"] == "docker.io/me/other:1"


def test_status_and_logs_show_what_render_has(fake: FakeRender) -> None:
    run("--name", "chat", "--image", IMAGE, "--model", "owner/name")
    shown = run("status", "--name", "chat").stdout
    assert "https://chat.onrender.com" in shown
    assert IMAGE in shown
    assert "live" in shown
    assert run("logs", "--name", "chat", "--limit", "2").stdout == "t1  line 1\nt2  line 2\n"
    assert json.loads(run("status", "--name", "chat", "--json").stdout)["service"]["name"] == "chat"
    lines = run("logs", "--name", "chat", "--limit", "2", "--json").stdout.splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["line 1", "line 2"]
    assert "no service named 'other'" in run("logs", "--name", "other", succeeds=False).stderr


def test_deploy_asks_which_workspace_when_there_are_several(fake: FakeRender) -> None:
    fake.owners.append({"id": "tea-2", "name": "theirs"})
    refused = run("--image", IMAGE, "--model", "owner/name", succeeds=False)
    assert "--owner" in refused.stderr
    assert "tea-2 (theirs)" in refused.stderr
    run("--image", IMAGE, "--model", "owner/name", "--owner", "tea-1")


def test_wrong_key_is_refused_without_being_shown(fake: FakeRender, monkeypatch) -> None:
    monkeypatch.setenv("RENDER_API_KEY", "rnd_wrong")
    refused = run("status", succeeds=False)
    assert (refused.exit_code, "RENDER_API_KEY" in refused.stderr, "rnd_wrong" in refused.output) == (2, True, False)
    monkeypatch.delenv("RENDER_API_KEY")
    assert "set RENDER_API_KEY" in run("status", succeeds=False).stderr


def test_dry_run_prints_everything_but_secrets_and_calls_nothing(fake: FakeRender, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shown = run("--image", IMAGE, "--model", "owner/name", "--dry-run").stdout
    assert fake.requests == []
    assert TOKEN not in shown
    assert check_blueprint(shown, ROOT) == []
    assert {"key": "HF_TOKEN", "sync": False} in yaml.safe_load(shown)["services"][0]["envVars"]
    assert '"imagePath"' in shown


def test_plan_is_sized_by_the_headers_of_the_models_files(tmp_path: Path) -> None:
    """In a process of its own: the Hub's client reads its address when it is imported."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [600, 10**6], "data_offsets": [0, 2_400_000_000]}}).encode()
    large = len(header).to_bytes(8, "little") + header
    with serving_hub() as hub:
        hub.publish("owner/large", {**model_files(), "model.safetensors": large})
        hub.publish("owner/tiny", model_files())
        plans = dict[str, str]()
        for name in ("large", "tiny"):
            command = (
                sys.executable,
                "-m",
                "trimaran.cli",
                "deploy",
                "render",
                "--model",
                f"owner/{name}",
                "--dry-run",
            )
            environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HOME": str(tmp_path)}
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
            assert done.returncode == 0, done.stderr
            plans[name] = yaml.safe_load(done.stdout)["services"][0]["plan"]
    assert plans == {"large": "pro", "tiny": "standard"}


def test_model_whose_size_is_unknown_gets_the_standard_plan(fake: FakeRender) -> None:
    done = run("--model", "owner/name", "--dry-run")
    assert yaml.safe_load(done.stdout)["services"][0]["plan"] == "standard"
    assert "not known (no network in tests)" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "owner/name"),
        ("--image", IMAGE, "--model", "owner/name", "--plan", "free"),
        ("--model", "owner/name", "--disk-gb", "10", "--region", "frankfurt"),
        ("--image", IMAGE, "--gateway", "https://x--y.modal.run", "--shutdown-delay", "30"),
        ("--image", IMAGE, "--env", "SERVE_ENGINE=echo"),
    ],
)
def test_written_blueprint_has_no_findings(fake: FakeRender, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run(*arguments, "--write", str(tmp_path / "render.yaml"))
    assert check_blueprint((tmp_path / "render.yaml").read_text(), ROOT) == []
    assert fake.requests == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "a/b"), "name what to run"),
        (("--image", IMAGE), "name a model"),
        (("--image", IMAGE, "--model", "tests"), "is a folder of this machine"),
        (("--image", IMAGE, "--model", "a/b", "--plan", "huge"), "no plan 'huge'"),
        (("--image", IMAGE, "--model", "a/b", "--region", "mars"), "no region 'mars'"),
        (("--image", IMAGE, "--repo", "r", "--model", "a/b"), "not both"),
        (("--image", IMAGE, "--model", "a/b", "--env", "HF_TOKEN=x"), "export HF_TOKEN"),
        (("--image", IMAGE, "--model", "a/b", "--env", "SERVE_MAX_QUEU=1"), "did you mean SERVE_MAX_QUEUE"),
    ],
)
def test_deploy_refuses_before_it_calls(fake: FakeRender, arguments: tuple[str, ...], words: str) -> None:
    assert words in run(*arguments, succeeds=False).stderr
    assert fake.requests == []
