"""The target for RunPod: its queue against the local control plane, and load balancing; ``scripts/image`` runs this."""

from __future__ import annotations

import dataclasses

import pytest
from containers import HARDENED, Image, Tool
from contracts import PROBE, check_probe, probe_arguments, runpod_http
from runpod_local import local_runpod, openai_input
from support import eventually


@pytest.fixture(scope="module")
def worker(tool: Tool) -> Image:
    return tool.image("runpod-thin", {"EXTRAS": ""}, target="runpod")


def test_worker_image_declares_the_handler_and_no_port(worker: Image) -> None:
    config = worker.inspect()["Config"]
    assert config["Entrypoint"] == ["python", "-u", "deploy/runpod/handler.py"]
    assert config["User"] == "10001"
    assert not config.get("ExposedPorts")
    assert '"pkg:pypi/runpod@' in worker.bill().read_text()


def test_worker_image_takes_jobs_and_drains(worker: Image) -> None:
    with local_runpod() as local:
        environment = {
            "SERVE_ENGINE": "echo",
            "SERVE_LOG_FORMAT": "text",
            **local.plane.worker_environment(local.url, "container"),
        }
        container = worker.create(options=("--network", "host", *HARDENED), **environment)
        try:
            eventually(lambda: "Taking jobs" in container.log or not container.is_running, timeout_s=60)
            answer = local.runsync(openai_input("queued"))
            assert answer["status"] == "COMPLETED", (answer, container.log)
            pieces, view = local.stream(local.run(openai_input("streamed", stream=True)))
            assert view["status"] == "COMPLETED"
            assert pieces[-1].endswith("data: [DONE]\n\n")
            container.terminate()
            assert container.wait() == 0
        finally:
            container.remove()


def test_worker_image_serves_http_behind_the_load_balancer(worker: Image) -> None:
    contract = runpod_http()
    contract = dataclasses.replace(contract, environment={**contract.environment, "SERVE_RUNPOD_MODE": "http"})
    with worker.running(options=HARDENED, **contract.without_model()) as container:
        check_probe(contract, container.python(PROBE, *probe_arguments(contract)))
        assert container.stop() == 0
