"""The image with torch (CPU wheels) and real weights, mounted and baked; ``scripts/image`` runs this."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import cpu_wheels
from containers import HARDENED, KERNELS, MEASURED, Image, Served, Tool
from fake_hub import Hub, serving_hub
from support import joined, sse_chunks

from serve import kernels

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKEN = "hf_" + "Q7x" * 12
CACHE = ("--tmpfs", "/data:mode=1777")
STARTER = (*HARDENED, *CACHE, "--memory", "512m", "--memory-swap", "512m")
OPEN = {"SERVE_ALLOW_ANONYMOUS": "true"}


def question(model: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Name the capital of France."}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24, **fields}


def answer(served: Served, **fields: Any) -> str:
    """The plain answer; it must equal the streamed one."""
    model = served.client.get("/v1/models").json()["data"][0]["id"]
    body = served.client.post("/v1/chat/completions", json=question(model, **fields)).json()
    plain = body["choices"][0]["message"]["content"]
    streamed = served.client.post("/v1/chat/completions", json=question(model, stream=True, **fields)).text
    assert joined(sse_chunks(streamed)) == plain
    return plain


@pytest.fixture(scope="module")
def cpu(tool: Tool) -> Image:
    return tool.image("cpu", cpu_wheels())


@pytest.fixture(scope="module")
def hub(demo_model: Path) -> Iterator[Hub]:
    with serving_hub() as hub:
        hub.publish(MODEL_ID, {path.name: path.read_bytes() for path in demo_model.iterdir() if path.is_file()})
        yield hub


@pytest.fixture(scope="module")
def baked(tool: Tool, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Image:
    secret = tmp_path_factory.mktemp("secret") / "token"
    secret.write_text(TOKEN)
    endpoint = f"http://127.0.0.1:{hub.port}"
    arguments = {"MODEL_ID": MODEL_ID, "HF_ENDPOINT": endpoint, **cpu_wheels()}
    return tool.image("baked", arguments, secret=secret)


def mounted(folder: Path, place: str) -> tuple[str, ...]:
    return ("--volume", f"{folder}:{place}:ro")


def test_cpu_image_is_at_most_one_and_a_half_gigabytes(cpu: Image) -> None:
    assert cpu.num_bytes <= 1.5e9
    with cpu.running(**OPEN, SERVE_ENGINE="echo") as container:
        found = container.python("import json, torch; print(json.dumps([torch.__version__, torch.version.cuda]))")
    assert found == ["2.13.0+cpu", None]
    assert '"pkg:pypi/torch@2.13.0%2Bcpu"' in cpu.bill().read_text()


def test_cpu_image_has_the_compiled_kernels_and_no_compiler(cpu: Image) -> None:
    compiled = [kernels.library().name] if kernels.is_for_this_machine() else []
    with cpu.running(**OPEN, SERVE_ENGINE="echo") as container:
        assert container.python(KERNELS) == sorted([*compiled, *(path.name for path in kernels.sources())])
        assert container.execute("sh", "-c", "command -v cc gcc clang ld").stdout == ""


def test_real_weights_answer_within_render_starters_memory(cpu: Image, demo_model: Path) -> None:
    options = (*STARTER, *mounted(demo_model, "/weights"))
    with cpu.serving(options=options, SERVE_MODEL="/weights", SERVE_MAX_MODEL_LEN="1024", **OPEN) as served:
        first = served.client.get("/ready")
        assert first.status_code == 503, "the port opens before the model is there"
        assert served.client.get("/health").json()["status"] == "loading"
        assert served.container.execute("python", "-m", "serve.healthcheck").returncode == 0
        served.wait_ready(120)
        MEASURED.append(("cpu image: run to /health", f"{served.health_s:.2f} s"))
        MEASURED.append(("cpu image: cold start", json.dumps(served.client.get("/version").json()["phases"])))
        assert "Paris" in answer(served)
        is_fit = kernels.is_for_this_machine() and not kernels.missing_instructions()
        assert ("Kernels: compiled for this CPU" in served.container.log) == is_fit

        body = question("weights", stream=True, max_tokens=200)
        with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            begun = [next(lines) for _ in range(3)]
            served.container.terminate()
            chunks = sse_chunks("\n".join([*begun, *lines]))
        assert chunks[-1]["choices"][0]["finish_reason"] in {"stop", "length"}
        assert served.container.wait() == 0


@pytest.mark.parametrize("place", ["/repository", "/opt/ml/model"])
def test_mounted_model_is_served_without_naming_it(cpu: Image, demo_model: Path, place: str) -> None:
    """Hugging Face Endpoints and SageMaker put the model there."""
    with cpu.serving("serve", options=(*HARDENED, *CACHE, *mounted(demo_model, place)), **OPEN) as served:
        served.wait_ready(120)
        assert "Paris" in answer(served)


def test_baked_weights_need_neither_network_nor_cache(baked: Image, hub: Hub) -> None:
    before = len(hub.requests)
    with baked.serving(**OPEN) as served:
        served.wait_ready(120)
        assert served.client.get("/v1/models").json()["data"][0]["id"] == MODEL_ID
        assert f'"pkg:huggingface/{MODEL_ID}"' in baked.bill().read_text()
        assert "Paris" in answer(served)
        assert "compared before" in served.container.log
    assert len(hub.requests) == before


def test_build_secret_was_used_and_is_nowhere_in_the_image(baked: Image, hub: Hub, tool: Tool) -> None:
    assert f"Bearer {TOKEN}" in hub.credentials
    assert TOKEN not in json.dumps(baked.inspect())
    history = subprocess.run([*tool.run, "history", "--no-trunc", baked.name], capture_output=True, text=True)
    assert TOKEN not in history.stdout
    with baked.running(options=(*HARDENED, "--user", "0"), SERVE_ENGINE="echo", **OPEN) as container:
        places = ("/models", "/src", "/data", "/home", "/root", "/app", "/tmp", "/etc", "/var")  # noqa: S108
        assert container.execute("grep", "-rlFs", TOKEN, *places).stdout == ""
        assert container.execute("grep", "-rlFs", "LlamaForCausalLM", "/models").stdout, "the search itself works"


def test_unreadable_weights_are_told_from_missing_ones(cpu: Image, tmp_path: Path, demo_model: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    for path in demo_model.iterdir():
        if path.is_file():
            (closed / path.name).write_bytes(path.read_bytes())
    (closed / "model.safetensors").chmod(0o600)
    tmp_path.chmod(0o755)
    with cpu.running(options=(*HARDENED, *CACHE, *mounted(closed, "/weights")), SERVE_MODEL="/weights", **OPEN) as c:
        assert c.wait(60) == 3
        assert "/weights/model.safetensors exists but is not readable by uid 10001" in c.log
