"""What each platform asks of the image, read from the files that are deployed there."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / "deploy" / "templates"
SECRET = "a-secret-of-the-platform"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """One platform: how it starts the image, where it looks for life and for readiness, where requests go.

    ``grace_s`` are the seconds between SIGTERM and SIGKILL, where the platform's file or documentation names them.
    """

    environment: Mapping[str, str]
    port: int
    live: str = "/health"
    ready: str = "/ready"
    route: str = "/v1/chat/completions"
    command: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    grace_s: float = 30.0

    @property
    def needs_key(self) -> bool:
        """Whether the server itself checks keys there."""
        return "SERVE_API_KEYS" in self.environment

    def without_model(self) -> dict[str, str]:
        """The environment for an image without torch: the echo engine in the model's place."""
        kept = {name: value for name, value in self.environment.items() if name != "SERVE_MODEL"}
        return {**kept, "SERVE_ENGINE": "echo"}

    def problems(self) -> list[str]:
        """What the settings of this contract get wrong among themselves."""
        found: list[str] = []
        if int(self.environment.get("PORT", self.port)) != self.port:
            found.append("PORT is not the port that the platform talks to")
        if float(self.environment.get("SERVE_DRAIN_TIMEOUT_S", 25)) >= self.grace_s:
            found.append("the drain outlives the platform's patience")
        if not self.needs_key and self.environment.get("SERVE_ALLOW_ANONYMOUS") != "true":
            found.append("the server refuses to start: neither keys nor SERVE_ALLOW_ANONYMOUS")
        return found


def _yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def _toml(path: str) -> Any:
    return tomllib.loads((ROOT / path).read_text())


def _named(variables: list[dict[str, Any]], name: str = "name") -> dict[str, str]:
    """A list of variables as a mapping; one without a value comes from the platform's secrets."""
    return {str(item[name]): str(item.get("value", SECRET)) for item in variables}


def render() -> Contract:
    """Render sets PORT to 10000; variables that are asked for once may stay empty."""
    service = _yaml("deploy/render/render.yaml")["services"][0]
    asked = [item for item in service["envVars"] if item.get("sync") is not False]
    return Contract(
        environment={**_named(asked, "key"), "PORT": "10000"},
        port=10000,
        ready=service["healthCheckPath"],
        grace_s=service["maxShutdownDelaySeconds"],
    )


def runpod_http() -> Contract:
    """RunPod's load balancer asks /ping and sets PORT."""
    environment = {"PORT": "8888", "SERVE_API_KEYS": SECRET}
    return Contract(environment=environment, port=8888, ready="/ping")


def fly() -> Contract:
    """kill_timeout is in seconds."""
    given = _toml("deploy/templates/fly.toml")
    service = given["http_service"]
    environment = {**given["env"], "SERVE_API_KEYS": SECRET}
    ready = service["checks"][0]["path"]
    return Contract(
        environment=environment, port=service["internal_port"], ready=ready, grace_s=float(given["kill_timeout"])
    )


def cloud_run() -> Contract:
    """PORT is set to the container's port; SIGKILL comes 10 s after SIGTERM."""
    container = _yaml("deploy/templates/cloud-run.yaml")["spec"]["template"]["spec"]["containers"][0]
    port, start = container["ports"][0]["containerPort"], container["startupProbe"]
    assert start["failureThreshold"] * start["periodSeconds"] <= 1800, "Cloud Run's limit with a GPU"
    return Contract(
        environment={**_named(container["env"]), "PORT": str(port)},
        port=port,
        live=container["livenessProbe"]["httpGet"]["path"],
        ready=container["startupProbe"]["httpGet"]["path"],
        grace_s=10,
    )


def azure_container_apps() -> Contract:
    """All three probes must be there: the defaults end slow starts."""
    given = _yaml("deploy/templates/azure-container-apps.yaml")["properties"]
    container = given["template"]["containers"][0]
    probes = {probe["type"]: probe["httpGet"] for probe in container["probes"]}
    port = given["configuration"]["ingress"]["targetPort"]
    assert probes.keys() == {"Startup", "Liveness", "Readiness"}
    assert {probe["port"] for probe in probes.values()} == {port}
    assert all(1 <= probe.get("failureThreshold", 3) <= 10 for probe in container["probes"]), "Azure's limits"
    return Contract(
        environment=_named(container["env"]),
        port=port,
        live=probes["Liveness"]["path"],
        ready=probes["Readiness"]["path"],
        grace_s=given["template"]["terminationGracePeriodSeconds"],
    )


def huggingface() -> Contract:
    """One health route for everything; the model is mounted at /repository."""
    given = _yaml("deploy/templates/huggingface-endpoint.yaml")
    image = given["custom_image"]
    return Contract(environment=given["env"], port=image["port"], ready=image["healthRoute"])


def sagemaker() -> Contract:
    """The argument `serve`, and port 8080 always."""
    given = _yaml("deploy/templates/sagemaker.yaml")["create_model"]["PrimaryContainer"]
    return Contract(
        environment=given["Environment"],
        port=8080,
        live="/health",
        ready="/ping",
        route="/invocations",
        command=("serve",),
    )


def truss() -> Contract:
    """The start command takes the place of the entry point; another user runs it."""
    given = _yaml("deploy/templates/truss/config.yaml")
    server = given["docker_server"]
    first, *rest = shlex.split(server["start_command"])
    assert server["server_port"] != 8080, "Baseten's own"
    return Contract(
        environment=given["environment_variables"],
        port=server["server_port"],
        live=server["liveness_endpoint"],
        ready=server["readiness_endpoint"],
        route=server["predict_endpoint"],
        command=tuple(rest),
        options=("--entrypoint", first, "--user", "60000"),
    )


def cerebrium() -> Contract:
    """The Dockerfile's own port; keys come as a secret."""
    runtime = _toml("deploy/templates/cerebrium/cerebrium.toml")["cerebrium"]["runtime"]["custom"]
    assert (ROOT / runtime["dockerfile_path"]).is_file()
    return Contract(
        environment={"SERVE_API_KEYS": SECRET},
        port=runtime["port"],
        live=runtime["healthcheck_endpoint"],
        ready=runtime["readycheck_endpoint"],
    )


def koyeb() -> Contract:
    """The options of its command-line tool."""
    text = (TEMPLATES / "koyeb.sh").read_text().replace("\\\n", " ")
    variables = dict(re.findall(r"--env (\w+)=(\S+)", text))
    port, path = re.findall(r"--checks (\d+):http:(\S+)", text)[0]
    assert f"--ports {port}:http" in text
    return Contract(environment=variables, port=int(port), ready=path)


CONTRACTS: Mapping[str, Callable[[], Contract]] = {
    "render": render,
    "runpod-http": runpod_http,
    "fly": fly,
    "cloud-run": cloud_run,
    "azure-container-apps": azure_container_apps,
    "huggingface": huggingface,
    "sagemaker": sagemaker,
    "truss": truss,
    "cerebrium": cerebrium,
    "koyeb": koyeb,
}

PROBE = """
import json, sys, time, urllib.error, urllib.request
port, live, ready, route, key = sys.argv[1:]
def ask(path, body=None, key=""):
    headers = {"content-type": "application/json"} | ({"x-api-key": key} if key else {})
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body and json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)
def until_200(path):
    deadline = time.monotonic() + 20
    while (answer := ask(path))[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer[0]
body = {"messages": [{"role": "user", "content": "hello"}]} | ({} if route == "/invocations" else {"model": "echo"})
print(json.dumps({
    "live": until_200(live),
    "ready": until_200(ready),
    "answer": ask(route, body, key),
    "without_key": ask(route, body)[0],
}))
"""
"""Run inside the container: the platform's probes, one request with the key, and one without."""


def probe_arguments(contract: Contract) -> tuple[str, ...]:
    """What :data:`PROBE` wants to know."""
    key = (
        SECRET
        if contract.environment.get("SERVE_API_KEYS") == SECRET
        else contract.environment.get("SERVE_API_KEYS", "")
    )
    return str(contract.port), contract.live, contract.ready, contract.route, key


def check_probe(contract: Contract, found: Mapping[str, Any]) -> None:
    """Fail unless the platform would have been content."""
    assert (found["live"], found["ready"]) == (200, 200), found
    status, text = found["answer"]
    assert status == 200, found
    assert json.loads(text)["choices"][0]["message"]["content"] == "hello"
    assert found["without_key"] == (401 if contract.needs_key else 200)
