"""``trimaran deploy runpod`` against a local API that validates every body by RunPod's published schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_runpod import CREATE, KEY, FakeRunpodApi, serving_runpod_api

from trimaran.cli import main
from trimaran.platforms.runpod import api as api_module
from trimaran.platforms.runpod.api import RunpodApi
from trimaran.platforms.runpod.endpoint import EndpointSpec, create_body
from trimaran.platforms.runpod.pools import POOLS

IMAGE = "docker.io/me/trimaran:runpod"
NEW = ("--name", "chat", "--image", IMAGE, "--model", "owner/name")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRunpodApi]:
    with serving_runpod_api() as fake:
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        monkeypatch.setenv("RUNPOD_API_URL", fake.url)
        yield fake


def run(*arguments: str, succeeds: bool = True, answer: str | None = None) -> Result:
    done = CliRunner(env={"CI": ""}).invoke(main, ["deploy", "runpod", *arguments], input=answer)
    assert (done.exit_code == 0) is succeeds, (done.output, done.exception)
    assert KEY not in done.output
    return done


def sent(fake: FakeRunpodApi, method: str) -> Any:
    """The body of the last request of that kind."""
    return [body for name, _, body in fake.requests if name == method][-1]


def test_deploy_creates_a_queue(fake: FakeRunpodApi):
    done = run(*NEW, "--gpu", "ADA_24,AMPERE_48", "--min", "1", "--hf-token-secret", "hf", "--weights-gb", "20")
    assert done.stdout == "https://api.runpod.ai/v2/x/openai/v1\n"
    body = sent(fake, "POST")
    assert (body["type"], body["scaling"]["type"]) == ("QUEUE", "QUEUE_DELAY")
    assert body["env"] == {
        "RUNPOD_INIT_TIMEOUT": "1800",
        "SERVE_RUNPOD_MODE": "queue",
        "SERVE_MODEL": "owner/name",
        "HF_TOKEN": "{{ RUNPOD_SECRET_hf }}",
    }
    assert body["gpu"] == {"pools": ["ADA_24", "AMPERE_48"], "count": 1, "minCudaVersion": "13.0"}
    assert body["workers"] == {"min": 1, "max": 3, "idleTimeout": 10}
    assert (body["disk"], body["timeout"], body["flashboot"]) == (40, 600_000, "FLASHBOOT")


def test_deploy_creates_a_load_balancer_and_says_who_may_ask(fake: FakeRunpodApi):
    done = run(*NEW, "--mode", "http")
    assert done.stdout == "https://x.api.runpod.ai/v1\n"
    assert "asks for no key of its own" in done.stderr
    body = sent(fake, "POST")
    assert (body["type"], body["scaling"]["type"], body["ports"]) == ("LOAD_BALANCER", "REQUEST_COUNT", ["8000/http"])
    assert (body["env"]["PORT"], body["env"]["HEALTH_CHECK_PATH"]) == ("8000", "/ping")
    assert body["env"]["SERVE_ALLOW_ANONYMOUS"] == "true"


def test_deploy_with_keys_of_our_own_is_not_open(fake: FakeRunpodApi):
    done = run(*NEW, "--mode", "http", "--api-keys-secret", "ours")
    assert "asks for no key" not in done.stderr
    environment = sent(fake, "POST")["env"]
    assert environment["SERVE_API_KEYS"] == "{{ RUNPOD_SECRET_ours }}"
    assert "SERVE_ALLOW_ANONYMOUS" not in environment


def test_an_update_changes_only_what_is_named(fake: FakeRunpodApi):
    run(*NEW, "--env", "SERVE_MAX_QUEUE=8", "--exclude-gpu", "NVIDIA L4")
    fake.endpoints["ep0"]["env"]["ADDED_IN_THE_CONSOLE"] = "yes"
    done = run("--name", "chat", "--max", "5", "--env", "SERVE_MAX_QUEUE=9", "--unset", "RUNPOD_INIT_TIMEOUT")
    assert "Updated chat (ep0)" in done.stderr
    body = sent(fake, "PATCH")
    assert body.keys() == {"env", "workers"}
    assert body["workers"] == {"max": 5}
    assert body["env"] == {
        "SERVE_RUNPOD_MODE": "queue",
        "SERVE_MODEL": "owner/name",
        "SERVE_MAX_QUEUE": "9",
        "ADDED_IN_THE_CONSOLE": "yes",
    }
    run("--name", "chat", "--gpu", "AMPERE_24,ADA_24")  # the same pools: the exclusion must survive
    assert fake.endpoints["ep0"]["gpu"]["excludedTypes"] == ["NVIDIA L4"]


def test_the_mode_of_an_endpoint_cannot_change(fake: FakeRunpodApi):
    run(*NEW)
    done = run(*NEW, "--mode", "http", succeeds=False)
    assert "is an endpoint of mode queue, and RunPod cannot change that" in done.stderr
    assert "delete it first" in done.stderr


def test_two_endpoints_of_one_name_want_an_id(fake: FakeRunpodApi):
    run(*NEW)
    fake.create(dict(sent(fake, "POST")))
    assert "choose one with --id; there are ep0, ep1" in run(*NEW, succeeds=False).stderr
    run(*NEW, "--id", "ep1", "--max", "7")
    assert fake.endpoints["ep1"]["workers"]["max"] == 7


def test_wait_ends_with_a_worker_of_this_version(fake: FakeRunpodApi):
    stale = {**fake.workers[0], "id": "old", "isStale": True}
    fake.workers = [stale, {**stale, "id": "new", "isStale": False, "status": "RUNNING"}]
    assert "RUNNING" in run(*NEW, "--wait").stderr


def test_status_logs_rollback_and_delete(fake: FakeRunpodApi):
    run(*NEW)
    run("--name", "chat", "--image", f"{IMAGE}-2")
    run("--name", "chat", "--image", f"{IMAGE}-3")
    shown = run("status", "--name", "chat").stdout
    assert f"{IMAGE}-3" in shown
    assert "version 3" in shown
    assert "w1  Ready after 3 s" in run("logs", "--name", "chat").stdout
    assert json.loads(run("status", "--name", "chat", "--json").stdout)["endpoint"]["name"] == "chat"
    (line,) = run("logs", "--name", "chat", "--json").stdout.splitlines()
    assert json.loads(line)["worker"] == "w1"
    run("rollback", "--name", "chat")
    assert sent(fake, "PATCH") == {"image": f"{IMAGE}-2"}
    run("rollback", "--name", "chat", "--to", "1")
    assert sent(fake, "PATCH") == {"image": IMAGE}
    assert "there are: " in run("rollback", "--name", "chat", "--to", "99", succeeds=False).stderr
    run("delete", "--name", "chat", answer="n\n", succeeds=False)
    assert fake.endpoints
    run("delete", "--name", "chat", "--yes")
    assert not fake.endpoints
    assert "there is no endpoint 'chat'" in run("status", "--name", "chat", succeeds=False).stderr


def test_refusals_show_the_field(fake: FakeRunpodApi):
    done = run(*NEW, "--min-cuda", "13", succeeds=False)
    assert "422" in done.stderr
    assert "request validation failed" in done.stderr
    assert "$.gpu" in done.stderr


def test_a_wrong_key_is_explained(fake: FakeRunpodApi, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_wrong")
    done = run(*NEW, succeeds=False)
    assert "set RUNPOD_API_KEY" in done.stderr
    assert "rpa_wrong" not in done.output
    monkeypatch.delenv("RUNPOD_API_KEY")
    assert "set RUNPOD_API_KEY" in run(*NEW, succeeds=False).stderr


def test_bad_moments_pass_where_that_is_safe(fake: FakeRunpodApi, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api_module, "MAX_WAIT_S", 0.0)
    fake.failures = [429, 503]  # of the list that every deploy begins with
    run(*NEW)
    fake.failures = [429, 500, 502, 503]
    assert "503" in run(*NEW, succeeds=False).stderr
    api = RunpodApi(KEY, fake.url)
    fake.failures = [500]  # a create may have been carried out: it is not sent again
    num_endpoints = len(fake.endpoints)
    with pytest.raises(Exception, match="500"):
        api.create(create_body(EndpointSpec(name="x", image=IMAGE, model="a/b")))
    assert len(fake.endpoints) == num_endpoints
    api.close()
    slow = RunpodApi(KEY, fake.url, timeout_s=0.1)
    fake.failures = [0.3]
    with pytest.raises(Exception, match=r"did not answer: ReadTimeout at DELETE /v2/serverless/ep0$"):
        slow.delete("ep0")
    slow.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "a/b"), "name the image"),
        (("--image", IMAGE), "name a model"),
        (("--image", IMAGE, "--model", "."), "is a folder of this machine"),
        ((*NEW, "--env", "HF_TOKEN=hf_x"), "RunPod would show it in plain text"),
        ((*NEW, "--env", "novalue"), "write NAME=VALUE"),
    ],
)
def test_what_cannot_be_deployed_is_explained(fake: FakeRunpodApi, arguments, said):
    done = run(*arguments, succeeds=False)
    assert said in done.stderr
    assert "hf_x" not in done.output


def test_dry_run_prints_a_valid_request_and_calls_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    done = run(*NEW, "--cached-model", "--dry-run", "--env", "MY_PASSWORD=letmein")
    body = json.loads(done.stdout)
    assert not list(CREATE.iter_errors(body))
    assert body["env"]["MY_PASSWORD"] == "..."
    assert "--model-reference https://huggingface.co/owner/name:main" in done.stderr


@pytest.mark.parametrize("mode", ["queue", "http"])
def test_every_setting_makes_a_valid_body(mode):
    spec = EndpointSpec(
        name="n",
        mode=mode,
        image=IMAGE,
        model="a/b",
        pools=tuple(POOLS),
        excluded=("NVIDIA L4",),
        gpu_count=2,
        min_cuda="12.8",
        workers_min=1,
        workers_max=9,
        idle_s=60,
        disk_gb=100,
        timeout_s=900,
        flashboot=False,
        registry="reg1",
        volumes=("vol1",),
        data_centers=("US-TX-3",),
        environment={"A": "b"},
        secrets={"HF_TOKEN": "hf"},
    )
    assert not list(CREATE.iter_errors(create_body(spec)))
