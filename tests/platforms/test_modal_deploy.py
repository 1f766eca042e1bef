"""What the real ``modal deploy`` sends for ``deploy/modal/app.py``, and what it refuses before it sends anything."""

from __future__ import annotations

import json
import re
import runpy
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import adapter_files, model_files, write
from modal_local import ROOT, Deployed, deployed, modal_deploy, volume_ids
from modal_proto import api_pb2 as pb

from trimaran.emulate.modal.service import Emulator
from trimaran.emulate.modal.tree import tree

TOKEN = "hf_" + secrets.token_hex(8)


@pytest.fixture(scope="module")
def web() -> Iterator[Deployed]:
    """The defaults, with a list of GPUs."""
    with deployed(SERVE_MODAL_GPU="h100,A100-80GB", HF_TOKEN=TOKEN, SERVE_MAX_BATCH_SIZE="24") as made:
        yield made


@pytest.fixture
def account() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


def test_function_has_the_defaults_that_survive_the_platforms_traps(web):
    function = web.function
    assert [variant.resources.gpu_config.gpu_type for variant in web.variants] == ["H100", "A100-80GB"]
    assert (function.timeout_secs, function.startup_timeout_secs) == (3600, 1800)
    scaling = function.autoscaler_settings
    assert (scaling.min_containers, scaling.max_containers, scaling.buffer_containers) == (0, 10, 0)
    assert scaling.scaledown_window == 300
    assert (function.target_concurrent_inputs, function.max_concurrent_inputs) == (24, 24 + 64)
    assert function.checkpointing_enabled
    assert not function.experimental_options
    assert (function.resources.milli_cpu, function.resources.memory_mb) == (2000, 4096)
    assert not function.scheduler_placement.regions
    hook = function.method_definitions["web"].webhook_config
    assert (hook.type, hook.requires_proxy_auth, hook.requested_suffix) == (pb.WEBHOOK_TYPE_ASGI_APP, False, "")


def test_secrets_are_one_secret_and_nowhere_else(web):
    (secret, public) = web.variables
    assert secret == {"SERVE_API_KEYS": "sk-test", "HF_TOKEN": TOKEN}
    assert not secret.keys() & public.keys()
    for text in (*web.image_steps, *public.values(), tree(web.emulator), web.output):
        assert "sk-test" not in text
        assert TOKEN not in text
    layers = b"".join(request.SerializeToString() for request in web.emulator.images.values())
    assert TOKEN.encode() not in layers


def test_container_gets_the_settings_that_were_given_and_its_address(web):
    public = web.variables[1]
    assert public["SERVE_MAX_BATCH_SIZE"] == "24"
    assert (public["SERVE_HOST"], public["SERVE_PORT"]) == (".".join("0000"), "8000")
    assert "SERVE_DEVICE" not in public
    assert public["SERVE_THREADS"] == "2"


def test_image_is_pinned_compiled_and_without_code_or_settings(web):
    steps = web.image_steps
    installs = [step for step in steps if "uv pip install" in step]
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert torch in installs[0]
    assert "--requirements /.uv/0/requirements.lock" in installs[1]
    assert all("--compile-bytecode" in step and ":latest" not in step for step in installs)
    assert not [step for step in steps if "SERVE_" in step or "runpod" in step or "uv:latest" in step]
    layers = web.emulator.layers(web.function.image_id)
    (context,) = [file for layer in layers for file in layer.context_files if "requirements.lock" in file.filename]
    assert context.data == (ROOT / "requirements.lock").read_bytes()
    assert b"runpod" not in context.data


def test_mounts_are_the_adapter_and_all_of_serve(web):
    package = {path for path in (ROOT / "serve").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert web.files == {"/root/app.py"} | {f"/root/{path.relative_to(ROOT)}" for path in package}
    assert any(name.endswith(".html") for name in web.files)


def test_weights_are_read_only_for_the_container_and_what_a_start_finds_out_is_kept(web):
    found = {
        mount.mount_path: (web.emulator.volumes[mount.volume_id].deployment_name, mount.read_only)
        for mount in web.function.volume_mounts
    }
    assert found == {"/models": ("trimaran-models", True), "/cache": ("trimaran-models-cache", False)}
    assert web.variables[1]["SERVE_CACHE_DIR"] == "/cache"


def test_changed_settings_make_no_new_image(account):
    assert modal_deploy(account).returncode == 0
    first = set(account.images)
    done = modal_deploy(account, SERVE_MAX_QUEUE="7", SERVE_MODAL_SCALEDOWN_WINDOW="60", SERVE_API_KEYS="other")
    assert done.returncode == 0
    assert set(account.images) == first


def test_server_has_its_own_shape():
    knobs = {"SERVE_MODAL_PRIMITIVE": "server", "SERVE_MODAL_GPU": "L4", "SERVE_DRAIN_TIMEOUT_S": "40"}
    with deployed(SERVE_PORT="9000", **knobs) as made:
        function = made.function
        assert function.is_server
        config = function.http_config
        assert (config.port, config.unauthenticated, config.startup_timeout) == (9000, True, 1800)
        assert config.exit_grace_period == 45
        assert function.autoscaler_settings.min_containers == 1
        assert function.autoscaler_settings.target_concurrency_float == 64
        assert function.max_concurrent_inputs == 128
        assert "SERVE_STREAM_WRITES_PER_S" not in made.variables[1]
        assert made.variables[1]["SERVE_PORT"] == "9000"


def test_knobs_reach_modal(account):
    account.stored_secrets["mine"] = {"SERVE_API_KEYS": "stored"}
    knobs = {
        "GPU": "L4",
        "SNAPSHOT": "gpu",
        "MIN_CONTAINERS": "1",
        "MAX_CONTAINERS": "3",
        "BUFFER_CONTAINERS": "2",
        "SCALEDOWN_WINDOW": "30",
        "TARGET_INPUTS": "5",
        "MAX_INPUTS": "9",
        "MEMORY": "9000",
        "CPU": "3.5",
        "REGION": "us-east, eu-west",
        "TIMEOUT": "100",
        "STARTUP_TIMEOUT": "200",
        "PROXY_AUTH": "true",
        "SECRET": "mine",
        "VOLUME": "elsewhere",
        "LABEL": "my-llm",
        "NAME": "my.app",
    }
    done = modal_deploy(account, SERVE_API_KEYS="", **{f"SERVE_MODAL_{name}": value for name, value in knobs.items()})
    assert done.returncode == 0, done.stdout + done.stderr
    made = Deployed(account, done.stdout)
    function = made.function
    scaling, hook = function.autoscaler_settings, function.method_definitions["web"].webhook_config
    assert (scaling.min_containers, scaling.max_containers, scaling.buffer_containers) == (1, 3, 2)
    assert (scaling.scaledown_window, function.timeout_secs, function.startup_timeout_secs) == (30, 100, 200)
    assert (function.target_concurrent_inputs, function.max_concurrent_inputs) == (5, 9)
    assert (function.resources.memory_mb, function.resources.milli_cpu) == (9000, 3500)
    assert list(function.scheduler_placement.regions) == ["us-east", "eu-west"]
    assert (hook.requires_proxy_auth, hook.requested_suffix) == (True, "my-llm")
    assert function.experimental_options["enable_gpu_snapshot"] == "True"
    assert (function.app_name, made.published.name) == ("my.app", "my.app")
    assert {account.volumes[mount.volume_id].deployment_name for mount in function.volume_mounts} == {
        "elsewhere",
        "elsewhere-cache",
    }
    assert {"SERVE_API_KEYS": "stored"} in made.variables


REFUSED = {
    "no key": ({"SERVE_API_KEYS": ""}, r"SERVE_API_KEYS=sk-[0-9a-f]{48} modal deploy deploy/modal/app\.py"),
    "no model": ({"SERVE_ENGINE": ""}, "SERVE_MODEL is not set"),
    "GPU": ({"SERVE_MODAL_GPU": "L44"}, "L44 is not a GPU.*T4, L4, A10"),
    "two GPUs": ({"SERVE_MODAL_GPU": "L4:2"}, "uses one GPU, and you would pay"),
    "number": ({"SERVE_MODAL_SCALEDOWN_WINDOW": "soon"}, "SCALEDOWN_WINDOW='soon' is not a number"),
    "range": ({"SERVE_MODAL_SCALEDOWN_WINDOW": "1"}, "not between 2 and 3600"),
    "choice": ({"SERVE_MODAL_PRIMITIVE": "https"}, "none of web, server"),
    "knob": ({"SERVE_MODAL_SCALEDWN": "3"}, "did you mean SERVE_MODAL_SCALEDOWN_WINDOW"),
    "least and most": ({"SERVE_MODAL_MIN_CONTAINERS": "11"}, "MIN_CONTAINERS=11 exceeds SERVE_MODAL_MAX_CONTAINERS=10"),
    "inputs": ({"SERVE_MODAL_TARGET_INPUTS": "9", "SERVE_MODAL_MAX_INPUTS": "8"}, "TARGET_INPUTS=9 exceeds"),
    "server at zero": ({"SERVE_MODAL_PRIMITIVE": "server", "SERVE_MODAL_MIN_CONTAINERS": "0"}, "answers 503"),
    "snapshot of no GPU": ({"SERVE_MODAL_SNAPSHOT": "gpu"}, "SNAPSHOT=gpu needs SERVE_MODAL_GPU"),
    "label": ({"SERVE_MODAL_LABEL": "My LLM"}, "small letters"),
    "setting": ({"SERVE_MAX_QUEUE": "many"}, "SERVE_MAX_QUEUE"),
    "model": ({"SERVE_ENGINE": "", "SERVE_MODEL": "./nowhere"}, "does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_deploy_is_refused_with_the_remedy_before_anything_is_created(monkeypatch, case):
    environment, message = REFUSED[case]
    for name, value in ({"SERVE_ENGINE": "echo", "SERVE_API_KEYS": "k", "HF_HUB_OFFLINE": "1"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MODAL_SERVER_URL", "http://127.0.0.1:9")  # nobody there: nothing may be asked for
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / "deploy/modal/app.py"))
    said = " ".join(str(refused.value).split())
    assert re.match(f"Not deployed: .*{message}", said), said


def test_command_shows_the_refusal_and_the_ready_command(account):
    done = modal_deploy(account, SERVE_API_KEYS="", SERVE_MODAL_GPU="L4")
    assert done.returncode == 1
    ready = r"SERVE_ENGINE=echo SERVE_MODAL_GPU=L4 SERVE_API_KEYS=sk-[0-9a-f]{48} modal deploy deploy/modal/app\.py\n"
    assert re.search(ready, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert account.requests == []


def test_missing_token_is_told_without_a_traceback(account):
    done = modal_deploy(account, MODAL_TOKEN_ID="", MODAL_TOKEN_SECRET="")
    assert done.returncode == 1
    assert "Not deployed: Token missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert account.requests == []


def test_stored_secret_that_is_not_there_stops_the_deploy(account):
    done = modal_deploy(account, SERVE_MODAL_SECRET="nowhere", SERVE_API_KEYS="")
    assert done.returncode != 0
    assert "'nowhere' not found" in " ".join((done.stdout + done.stderr).split())
    assert account.published is None


def test_refusal_names_the_package_that_is_missing(tmp_path, account):
    (tmp_path / "pydantic_settings.py").write_text("import nothing_of_this_name")
    done = modal_deploy(account, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "pip install -e '.[modal]'" in done.stdout + done.stderr
    assert account.requests == []


def test_local_model_is_uploaded_whole_and_served_from_the_volume(tmp_path, account):
    folder = write(tmp_path / "my-model", {**model_files(), "tokenizer.json": b"{}", "optimizer.pt": b"x" * 99})
    done = modal_deploy(account, SERVE_ENGINE="", SERVE_MODEL=str(folder), SERVE_MODAL_GPU="L4")
    assert done.returncode == 0, done.stdout + done.stderr
    made = Deployed(account, done.stdout)
    public = made.variables[1]
    assert re.fullmatch(r"/models/my-model-[0-9a-f]{12}", public["SERVE_MODEL"])
    assert public["SERVE_MODEL_NAME"] == "my-model"
    assert made.published.name == "my-model"
    volume_id = volume_ids(account)["trimaran-models"]
    uploaded = account.store.volume(volume_id) / Path(public["SERVE_MODEL"]).name
    assert {path.name for path in uploaded.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    for path in uploaded.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()

    again = modal_deploy(account, SERVE_ENGINE="", SERVE_MODEL=str(folder), SERVE_MODAL_GPU="L4")
    assert again.returncode == 0
    assert Deployed(account, "").variables[1]["SERVE_MODEL"] == public["SERVE_MODEL"]
    (folder / "tokenizer.json").write_bytes(b'{"changed": true}')
    assert modal_deploy(account, SERVE_ENGINE="", SERVE_MODEL=str(folder), SERVE_MODAL_GPU="L4").returncode == 0
    assert Deployed(account, "").variables[1]["SERVE_MODEL"] != public["SERVE_MODEL"]


def test_local_adapter_of_a_local_base_points_to_the_base_on_the_volume(tmp_path, account):
    base = write(tmp_path / "base", model_files())
    adapter = write(tmp_path / "adapter", adapter_files(str(base)))
    done = modal_deploy(account, SERVE_ENGINE="", SERVE_MODEL=str(adapter))
    assert done.returncode == 0, done.stdout + done.stderr
    made = Deployed(account, "")
    volume_id = volume_ids(account)["trimaran-models"]
    target = made.variables[1]["SERVE_MODEL"]
    config = json.loads((account.store.volume(volume_id) / Path(target).name / "adapter_config.json").read_text())
    assert re.fullmatch(r"/models/base-[0-9a-f]{12}", config["base_model_name_or_path"])
    assert any("peft==" in step for step in made.image_steps)


def test_broken_model_is_refused(tmp_path, monkeypatch):
    folder = write(tmp_path / "broken", {**model_files(), "model.safetensors": b"\x08"})
    for name, value in {"SERVE_MODEL": str(folder), "SERVE_API_KEYS": "k", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=r"model\.safetensors"):
        runpy.run_path(str(ROOT / "deploy/modal/app.py"))
