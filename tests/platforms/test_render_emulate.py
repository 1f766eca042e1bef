"""``trimaran emulate render``: the real server, with each rule kept and each rule broken."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from checkpoints import model_files, write
from containers import free_port

from serve.engine import cgroup
from trimaran.emulate.render import session as sessions
from trimaran.emulate.render.command import of_settings
from trimaran.emulate.render.instance import Instance
from trimaran.emulate.render.rules import Verdict
from trimaran.emulate.render.scene import Scene, read_scene
from trimaran.platforms.render.plans import Plan

BLUEPRINT = (Path(__file__).parents[2] / "deploy" / "render" / "render.yaml").read_text()
SLOW = "from serve.engine.echo import EchoEngine\nEchoEngine.__init__.__kwdefaults__['step_s'] = 0.006\n"


def scene(text: str = BLUEPRINT, **changes: str) -> Scene:
    variables = {"SERVE_ENGINE": "echo", **changes}
    return read_scene(text, name=None, plan=None, port=free_port(), changes=variables)


def findings(scene: Scene, folder: Path) -> dict[str, tuple[str, str]]:
    found = sessions.Session(scene, folder, lambda _: None).run()
    return {finding.rule: (finding.verdict.value, finding.detail) for finding in found}


def broken(found: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {rule: detail for rule, (verdict, detail) in found.items() if verdict != Verdict.KEPT.value}


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An echo of 6 ms a token: a stream of at least 2.4 seconds."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def test_committed_blueprint_keeps_every_rule() -> None:
    command = (sys.executable, "-m", "trimaran.cli", "emulate", "render", "deploy/render/render.yaml")
    options = ("--port", str(free_port()), "--env", "SERVE_ENGINE=echo")
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("kept ") for line in lines), done.stdout


def emulate(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "trimaran.cli", "emulate", "render", *arguments, "--port", str(free_port()))
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_without_a_blueprint_the_file_of_settings_decides(tmp_path: Path) -> None:
    nothing = emulate(folder=tmp_path)
    assert nothing.returncode == 2
    assert "trimaran init MODEL" in nothing.stderr
    (tmp_path / "trimaran.toml").write_text(
        '[model]\nengine = "echo"\n[serve]\nmax_queue = 3\n[render]\nname = "chat"\nplan = "pro_plus"\n'
        'image = "docker.io/me/trimaran:1"\n'
    )
    done = emulate("--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rules = {rule["rule"]: (rule["verdict"], rule["detail"]) for rule in json.loads(done.stdout)}
    assert {verdict for verdict, _ in rules.values()} == {"kept"}
    assert "stays within 8192 MB" in rules
    assert rules["Blueprint"][1].startswith("what trimaran deploy render would create")


def test_blueprint_of_the_settings_is_the_deploys_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model", model_files())
    (tmp_path / "trimaran.toml").write_text('[model]\nmodel = "./model"\n[serve]\nmax_queue = 3\n')
    text, _, changes = of_settings()
    assert changes == {"SERVE_MODEL": str(tmp_path / "model")}
    service = yaml.safe_load(text)["services"][0]
    assert service["plan"] == "standard", "the smallest that holds the folder's weights"
    assert {"key": "SERVE_MAX_QUEUE", "value": "3"} in service["envVars"]
    given = read_scene(text, name=None, plan=None, port=10000, changes=changes)
    assert given.variables["SERVE_MODEL"] == str(tmp_path / "model")


def test_stream_that_outlives_the_drain_breaks_the_rule(slow: None, tmp_path: Path) -> None:
    found = broken(findings(scene(SERVE_DRAIN_TIMEOUT_S="1"), tmp_path))
    assert list(found) == ["drains within 120 s of SIGTERM"]
    assert "SERVE_DRAIN_TIMEOUT_S" in found["drains within 120 s of SIGTERM"]


def test_drain_that_outlives_renders_patience_is_killed(slow: None, tmp_path: Path) -> None:
    text = BLUEPRINT.replace("maxShutdownDelaySeconds: 120", "maxShutdownDelaySeconds: 1")
    assert broken(findings(scene(text), tmp_path)) == {"drains within 1 s of SIGTERM": "killed after 1 s"}


def test_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    given = scene(SERVE_MAX_QUEUE="many")
    found = broken(findings(given, tmp_path))
    assert "ended with 2" in found[f"listens on PORT ({given.port})"]
    assert "SERVE_MAX_QUEUE" in found[f"listens on PORT ({given.port})"]


def test_health_path_that_never_answers_breaks_the_deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "HEALTHY_S", 6.0)
    found = broken(
        findings(scene(BLUEPRINT.replace("healthCheckPath: /health", "healthCheckPath: /v1/models")), tmp_path)
    )
    assert found == {"healthy within 15 min": "still not after 6 s"}


def test_memory_beyond_the_plan_is_killed(tmp_path: Path) -> None:
    tiny = replace(scene(), plan=Plan("tiny", 0.5, 20))
    instance = Instance(tiny, tmp_path, tmp_path / "log")
    try:
        assert instance.process.wait(20) == -9
        assert instance.is_over
        assert instance.peak_bytes is not None
        assert instance.peak_bytes > 20 * 2**20
    finally:
        instance.close()
    assert cgroup.cpus(tmp_path / "cgroup") == 0.5
    assert cgroup.free_memory(tmp_path / "cgroup") == 0, "what it took is seen by the server itself"


def test_scene_has_the_blueprints_variables_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_STRICT", "true")
    monkeypatch.setenv("HF_TOKEN", "asked-for-once")
    given = scene()
    environment = given.environment(tmp_path)
    assert "SERVE_STRICT" not in environment
    assert environment["HF_TOKEN"] == "asked-for-once"
    assert environment["PORT"] == str(given.port)
    assert len(given.key) >= 32
    assert not given.keeps_data
    assert scene(BLUEPRINT + "    disk: {name: models, mountPath: /data, sizeGB: 10}\n").keeps_data
