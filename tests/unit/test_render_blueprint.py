from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from render.public_api.models.plan import Plan as ApiPlan
from render.public_api.models.region import Region as ApiRegion

from serve.errors import ConfigError
from trimaran.cli import main
from trimaran.platforms.render.check import check_blueprint
from trimaran.platforms.render.plans import PLANS, REGIONS, smallest_plan

ROOT = Path(__file__).parents[2]
KEY = {"key": "SERVE_API_KEYS", "generateValue": True}


def service(**fields: Any) -> dict[str, Any]:
    """A service without a mistake, but for ``fields``; None removes one."""
    given = {
        "type": "web", "name": "chat", "runtime": "docker", "plan": "standard", "region": "oregon",
        "dockerfilePath": "./Dockerfile", "healthCheckPath": "/health", "envVars": [KEY], **fields,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def findings(*services: dict[str, Any], **top: Any) -> list[str]:
    return [str(finding) for finding in check_blueprint(yaml.safe_dump({"services": list(services), **top}), ROOT)]


def variables(*extra: dict[str, Any]) -> dict[str, Any]:
    return service(envVars=[KEY, *extra])


@pytest.mark.parametrize("name", ["render.yaml", "render-image.yaml"])
def test_our_blueprints_have_no_findings(name: str) -> None:
    assert check_blueprint((ROOT / "deploy" / "render" / name).read_text(), ROOT) == []


def test_plans_and_regions_are_those_of_renders_own_client() -> None:
    assert {plan.api_name for plan in PLANS.values()} <= {plan.value for plan in ApiPlan}
    assert set(REGIONS) == {region.value for region in ApiRegion}


DISK = {"name": "models", "mountPath": "/data", "sizeGB": 10}
SCALING = {"minInstances": 1, "maxInstances": 3, "targetCPUPercent": 70}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown plan": (service(plan="gpu"), "services[0].plan: there is no plan 'gpu'"),
    "the API's name of a plan": (service(plan="pro_plus"), "did you mean 'pro plus'?"),
    "unknown region": (service(region="mars"), "no region 'mars'"),
    "unknown field": (service(healthCheckInterval=5), "healthCheckInterval: Render has no such field"),
    "deprecated field": (service(autoDeploy=False), "autoDeploy: is deprecated; use autoDeployTrigger"),
    "old name of runtime": (service(runtime=None, env="docker"), "env: is deprecated; use runtime"),
    "wrong type": (service(type="website"), "services[0].type: input should be 'web'"),
    "wrong runtime": (service(runtime="python"), "services[0].runtime: input should be 'docker' or 'image'"),
    "missing name": (service(name=None), "services[0].name: is missing"),
    "delay too long": (service(maxShutdownDelaySeconds=301), "less than or equal to 300"),
    "number as a string": (service(maxShutdownDelaySeconds="60"), "should be a valid integer"),
    "delay on the free plan": (service(plan="free", maxShutdownDelaySeconds=60), "the free plan does not allow it"),
    "delay with a disk": (service(disk=DISK, maxShutdownDelaySeconds=60), "refuses it for services with a disk"),
    "disk on the free plan": (service(plan="free", disk=DISK), "the free plan has no disks"),
    "disk and scaling": (service(disk=DISK, scaling=SCALING), "scaling: a service with a disk runs a single"),
    "disk and instances": (service(disk=DISK, numInstances=2), "numInstances: a service with a disk"),
    "disk over the system": (service(disk={**DISK, "mountPath": "/etc"}), "Render forbids /etc"),
    "disk over the root": (service(disk={**DISK, "mountPath": "/"}), "Render forbids /"),
    "relative disk": (service(disk={**DISK, "mountPath": "data"}), "must be an absolute path"),
    "scaling and instances": (service(scaling=SCALING, numInstances=2), "remove one of the two"),
    "scaling upside down": (service(scaling={**SCALING, "minInstances": 9}), "exceeds maxInstances"),
    "scaling target": (service(scaling={**SCALING, "targetCPUPercent": 95}), "less than or equal to 90"),
    "scaling without target": (service(scaling={"minInstances": 1, "maxInstances": 2}), "needs targetCPUPercent"),
    "instances on the free plan": (service(plan="free", numInstances=2), "single instance"),
    "health path that is none": (service(healthCheckPath="/healthz"), "/healthz is no route of the app"),
    "health path behind a key": (service(healthCheckPath="/v1/models"), "needs a key"),
    "no health path": (service(healthCheckPath=None), "healthCheckPath: is missing"),
    "no such Dockerfile": (service(dockerfilePath="./Dockerfile.cpu"), "does not exist in the repository"),
    "no such context": (service(dockerContext="./nowhere"), "is not a folder of the repository"),
    "image without url": (service(runtime="image", dockerfilePath=None), "image: is missing"),
    "image and Dockerfile": (
        service(runtime="image", image={"url": "docker.io/a/b:1"}),
        "dockerfilePath: runtime image builds nothing",
    ),
    "image in a build": (service(image={"url": "docker.io/a/b:1"}), "runtime docker builds from the Dockerfile"),
    "secret by name": (variables({"key": "HF_TOKEN", "value": "abc"}), "HF_TOKEN is a secret"),
    "key as a value": (service(envVars=[{"key": "SERVE_API_KEYS", "value": "abc"}]), "SERVE_API_KEYS is a secret"),
    "secret by look": (variables({"key": "SERVE_CHAT_TEMPLATE", "value": "hf_" + "a" * 30}), "is a secret"),
    "fixed port": (variables({"key": "PORT", "value": 8080}), "PORT is hard-coded"),
    "fixed port of ours": (variables({"key": "SERVE_PORT", "value": "8080"}), "SERVE_PORT is hard-coded"),
    "loopback": (variables({"key": "SERVE_HOST", "value": "127.0.0.1"}), "not reachable for Render"),
    "misspelt setting": (variables({"key": "SERVE_MAX_QUEU", "value": "8"}), "did you mean SERVE_MAX_QUEUE?"),
    "no key at all": (service(envVars=[]), "SERVE_API_KEYS is missing"),
    "variable twice": (variables(KEY), "SERVE_API_KEYS is set twice"),
    "variable without source": (variables({"key": "A"}), "needs exactly one of"),
    "variable with two sources": (variables({"key": "A", "value": "1", "sync": False}), "needs exactly one of"),
    "sync true": (variables({"key": "A", "sync": True}), "only sync: false"),
    "unknown group": (variables({"fromGroup": "shared"}), "this file has no group 'shared'"),
    "drain longer than the delay": (
        service(envVars=[KEY, {"key": "SERVE_DRAIN_TIMEOUT_S", "value": "60"}], maxShutdownDelaySeconds=60),
        "must be shorter than the shutdown delay of 60 s",
    ),
    "half a build filter": (service(buildFilter={"paths": ["a"]}), "buildFilter.ignoredPaths: is missing"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_one_finding(mistake: str) -> None:
    given, words = MISTAKES[mistake]
    found = findings(given)
    assert len(found) == 1, found
    assert words in found[0]


def test_ten_mistakes_in_one_file_are_ten_findings() -> None:
    given = service(
        plan="gpu", region="mars", healthCheckPath="/up", healthCheckTimeout=5, dockerfilePath="./none",
        maxShutdownDelaySeconds=60, disk={**DISK, "mountPath": "/opt"}, scaling=SCALING,
        envVars=[KEY, {"key": "PORT", "value": 80}, {"key": "HF_TOKEN", "value": "hf_" + "a" * 20}],
    )  # fmt: skip
    assert len(findings(given)) == 10


def test_services_share_no_name_and_groups_no_secret() -> None:
    found = findings(service(), service(), envVarGroups=[{"name": "g", "envVars": [{"key": "API_KEY", "value": "x"}]}])
    assert len(found) == 2
    assert "'chat' is taken" in found[1]
    assert "API_KEY is a secret" in found[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("services: [", "is not YAML"),
        ("- a", "must be a mapping"),
        ("services: []", "services: list should have at least 1 item"),
        ("service: {}", "services: is missing"),
    ],
)
def test_file_that_is_no_blueprint_is_explained(text: str, words: str) -> None:
    assert any(words in str(finding) for finding in check_blueprint(text, ROOT))


def test_key_that_occurs_twice_is_found() -> None:
    text = yaml.safe_dump({"services": [service()]}) + "previews: {generation: off}\npreviews: {generation: manual}\n"
    assert any("occurs twice" in str(finding) for finding in check_blueprint(text.replace(": off", ": 'off'"), ROOT))


def test_check_command_lists_findings_with_status_1(tmp_path: Path) -> None:
    file = tmp_path / "render.yaml"
    file.write_text(yaml.safe_dump({"services": [service(plan="gpu")]}))
    command = ["deploy", "render", "check", str(file), "--root", str(ROOT)]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, len(done.stdout.splitlines()), done.stderr) == (1, 1, "1 findings\n")
    file.write_text(yaml.safe_dump({"services": [service()]}))
    assert CliRunner().invoke(main, command).exit_code == 0


def test_smallest_plan_grows_with_the_model() -> None:
    assert [smallest_plan(n).name for n in (270_000_000, 724_000_000, 1_200_000_000, 8_000_000_000)] == [
        "standard",
        "standard",
        "pro",
        "pro max",
    ]
    with pytest.raises(ConfigError, match="serve it on a GPU elsewhere"):
        smallest_plan(100_000_000_000)
