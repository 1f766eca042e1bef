"""How a worker starts and ends: modes, keys, exit statuses, the SDK's versions, the real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from runpod_local import ROOT, SLOW, LocalRunpod, local_runpod, openai_input, worker_process
from support import chat, eventually, joined, sse_chunks

from trimaran.demo_model import default_cache

HTTP = {"SERVE_ENGINE": "echo", "SERVE_PORT": "0", "SERVE_LOG_FORMAT": "text", "PYTHONPATH": str(ROOT)}
LOADING = "from serve.engine.echo import EchoEngine\nEchoEngine.__init__.__kwdefaults__['load_s'] = 1.5"


def address(log: str) -> str:
    return "http://127.0.0.1:" + log.partition("Listening on http://0.0.0.0:")[2].split()[0]


def test_http_mode_says_204_while_loading_and_never_imports_the_sdk():
    before = "import sys\nsys.modules['runpod'] = None\n" + LOADING
    with worker_process("w", before, {**HTTP, "SERVE_API_KEYS": "ours"}) as worker:
        eventually(lambda: "Listening on " in worker.log or worker.process.poll() is not None, 30)
        with httpx.Client(base_url=address(worker.log)) as client:
            first = client.get("/ping")
            assert (first.status_code, first.content) == (204, b"")
            eventually(lambda: client.get("/ping").status_code == 200)
            # Authorization carries RunPod's key there.
            headers = {"Authorization": "Bearer runpods"}
            assert client.post("/v1/chat/completions", json=chat("hi"), headers=headers).status_code == 401
            assert client.get("/v1/models", headers={"trimaran.caller": "runpod"}).status_code == 401
            headers["X-API-Key"] = "ours"
            assert client.post("/v1/chat/completions", json=chat("hi"), headers=headers).status_code == 200


def test_http_mode_without_keys_wants_to_be_told_so():
    with worker_process("w", "", HTTP) as worker:
        assert worker.exit_status() == 2
        assert "SERVE_ALLOW_ANONYMOUS=true" in worker.log


@pytest.mark.parametrize(
    ("environment", "status", "said"),
    [
        ({"SERVE_RUNPOD_MODE": "queue"}, 2, "RUNPOD_WEBHOOK_GET_JOB is not set"),
        ({"SERVE_RUNPOD_MOED": "queue"}, 2, "SERVE_RUNPOD_MOED is not a setting"),
        ({"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/job-take/$ID?gpu=none", "SERVE_MODEL": "/no"}, 3, "/no"),
    ],
)
def test_a_worker_that_cannot_work_says_why_and_ends(environment, status, said):
    engine = {"SERVE_ENGINE": "transformers"} if "SERVE_MODEL" in environment else {}
    with worker_process("w", "", {**HTTP, **engine, **environment}) as worker:
        assert worker.exit_status(40) == status, worker.log
        assert said in worker.log


def test_sigterm_while_loading_ends_at_once():
    with local_runpod() as local, local.worker("w", LOADING.replace("1.5", "60"), wait=False) as worker:
        eventually(lambda: "Phase fetch" in worker.log, 30)
        worker.process.terminate()
        assert worker.exit_status(5) == 0


def test_results_that_runpod_would_not_keep():
    limits = f"""
import sys
sys.path.insert(0, {str(ROOT / "deploy" / "runpod")!r})
import job_output, job_scaler
job_output.EventSplitter.__init__.__defaults__ = (1400,)
job_scaler.MAX_RESULT_BYTES, job_scaler.MAX_CHUNK_BYTES = 3000, 1500
"""
    with local_runpod() as local, local.worker("w", limits):
        fits, large = local.run(openai_input("a" * 1600)), local.run(openai_input("b" * 4000))
        assert local.result(fits)["output"][0]["choices"][0]["message"]["content"] == "a" * 1600
        assert local.num_chunks(fits) == 0  # too large to be streamed
        error = json.loads(local.result(large)["error"])
        assert (error["status"], error["error"]["code"]) == (413, "request_too_large")
        assert "at most 3000" in error["error"]["message"]
        streamed = local.run(openai_input("c" * 40, stream=True))
        pieces, last = local.stream(streamed)
        assert last["status"] == "COMPLETED"
        assert joined(sse_chunks("".join(pieces))) == "c" * 40
        assert "only /stream gave it" in local.status(streamed)["output"][0]["notice"]


def test_the_plain_scaler_of_an_untested_sdk_works_too():
    version = "import runpod.version\nrunpod.version.__version__ = '1.13.0'"
    with local_runpod(long_poll_s=1.0) as local, local.worker("w", version, SERVE_MAX_BATCH_SIZE="2") as worker:
        assert "runpod 1.13.0 was not tested" in worker.log
        pieces, last = local.stream(local.run(openai_input("héllo 🎉", stream=True)))
        assert last["status"] == "COMPLETED"
        assert joined(sse_chunks("".join(pieces))) == "héllo 🎉"
        job = local.result(local.run({"nothing": 1}))
        assert json.loads(job["error"])["status"] == 400


@pytest.fixture(scope="session")
def sdk2() -> Path:
    """The newest 2.x pre-release of the SDK in a folder of its own, brought from PyPI once."""
    folder = default_cache() / "runpod-2.0.0rc2"
    if not (folder / "done").exists():
        wanted = ["runpod==2.0.0rc2", "cloudpickle", "pathspec", "psutil"]
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--upgrade",
        ]
        subprocess.run([*pip, "--target", str(folder), *wanted], check=True, timeout=50)
        (folder / "done").touch()
    return folder


def test_the_pre_release_of_the_next_sdk_runs_the_worker(sdk2: Path):
    step = SLOW.format(step_s=0.02)
    with local_runpod(long_poll_s=20.0) as local, local.worker("w", step, PYTHONPATH=f"{sdk2}:{ROOT}") as worker:
        assert "Version 2.0.0rc2" in worker.log
        assert "was not tested" not in worker.log
        pieces, last = local.stream(local.run(openai_input("héllo 🎉", stream=True)))
        assert last["status"] == "COMPLETED"
        assert joined(sse_chunks("".join(pieces))) == "héllo 🎉"
        job = local.run(openai_input("x" * 2000, stream=True))
        eventually(lambda: local.num_chunks(job) > 1)
        local.post(f"/cancel/{job}")
        eventually(lambda: worker.logged(job).get("finish_reason") == "abort", 3)
        worker.process.terminate()  # idle, under a poll of 20 s
        assert worker.exit_status(5) == 0


RUNPODS_OWN_CLIENT = """
import json, runpod
runpod.api_key, runpod.endpoint_url_base = {key!r}, {url!r}
endpoint = runpod.Endpoint("local")
job_input = {job_input!r}
print(json.dumps({{
    "sync": endpoint.run_sync(job_input),
    "output": endpoint.run(job_input).output(timeout=30),
    "stream": list(endpoint.run({{**job_input, "stream": True}}).stream()),
    "cancelled": endpoint.run({{"messages": job_input["messages"]}}).cancel()["status"],
    "health": endpoint.health()["workers"],
}}))
"""


def test_runpods_own_client_works(runpod: LocalRunpod):
    code = RUNPODS_OWN_CLIENT.format(
        key=runpod.plane.key, url=f"{runpod.url}/v2", job_input={"messages": chat("hé 🎉")["messages"]}
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert [piece["text"] for piece in got["sync"]] == ["hé 🎉"]
    assert got["output"] == got["sync"]
    assert "".join(piece["text"] for piece in got["stream"]) == "hé 🎉"
    assert got["cancelled"] in {"CANCELLED", "COMPLETED"}
    assert sum(got["health"].values()) == 1


@pytest.mark.timeout(120)
def test_the_real_models_answer_through_the_queue(demo_model: Path, demo_embedding: Path):
    models = {"SERVE_MODEL": str(demo_model), "SERVE_EMBEDDING_MODEL": str(demo_embedding)}
    environment: Any = {"SERVE_ENGINE": "transformers", "SERVE_MAX_BATCH_SIZE": "2", **models}
    with local_runpod(dead_after_s=30.0) as local, local.worker("w", **environment):
        client = openai.OpenAI(base_url=f"{local.base}/openai/v1", api_key=local.plane.key, max_retries=0)
        message: Any = {"role": "user", "content": "What is the capital of France?"}
        asked: Any = {"model": demo_model.name, "messages": [message], "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        streamed = "".join(
            c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True)
        )
        assert whole == streamed
        assert "Paris" in streamed
        native = {"messages": [message], "sampling_params": {"max_tokens": 24, "temperature": 0}}
        assert local.runsync(native)["output"][0]["text"] == whole
        as_numbers, as_text = (
            client.embeddings.create(model=demo_embedding.name, input="A boat.", encoding_format=form)
            for form in ("float", "base64")
        )
        assert len(as_numbers.data[0].embedding) == 384
        assert as_text.data[0].embedding, "the client asks for base64 unless told otherwise"


def test_the_command_runs_a_queue_with_a_real_worker():
    command = [str(Path(sys.executable).parent / "trimaran"), "emulate", "runpod", "--port", "0", "--endpoint", "mine"]
    environment = {**os.environ, "SERVE_ENGINE": "echo"}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        answer = httpx.post(
            f"{url}/v2/mine/runsync",
            json={"input": {"messages": chat("hi")["messages"]}},
            headers={"Authorization": "Bearer local-key"},
            timeout=50,
        ).json()
        assert answer["output"][0]["text"] == "hi"
        assert httpx.get(f"{url}/v2/mine/health").status_code == 401
        process.terminate()
        rest = process.communicate(timeout=20)[1]
        assert process.returncode == 0, rest
        assert "another takes its place" not in rest
