"""The two stages around a memory snapshot.  ``os.fork`` stands for the restore: two processes from one memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import load, tiny_llama

from serve.engine.base import EngineConfig
from serve.engine.loader import load_detached, load_model

ROOT = Path(__file__).parents[2]

SNAPSHOT = """
import json, os, sys, threading
import torch

NAMES = ("is_available", "device_count", "init", "current_device", "mem_get_info", "get_device_capability")
genuine = {name: getattr(torch.cuda, name) for name in NAMES}

def asked(*_):
    raise AssertionError("a GPU was asked for before the snapshot")

for name in NAMES:
    setattr(torch.cuda, name, asked)

from serve import create_app, create_lifecycle, load_settings

lifecycle = create_lifecycle(load_settings())
lifecycle.prepare()
folder = os.environ["SERVE_MODEL"]
opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
print(json.dumps({
    "files": [line for line in [*open("/proc/self/maps"), *opened] if folder in line],
    "threads": [thread.name for thread in threading.enumerate()],
    "phases": list(lifecycle.phases),
}), flush=True)

def restored(key):
    for name in NAMES:
        setattr(torch.cuda, name, genuine[name])
    os.environ["SERVE_API_KEYS"] = key
    settings = load_settings()
    lifecycle.restored(settings)
    from fastapi.testclient import TestClient
    with TestClient(create_app(settings, lifecycle=lifecycle)) as client:
        body = {"model": settings.served_name, "max_tokens": 16, "messages": [{"role": "user", "content": "hello"}]}
        post = lambda key: client.post("/v1/chat/completions", json=body, headers={"x-api-key": key})
        print(json.dumps({
            "text": post(key).json()["choices"][0]["message"]["content"],
            "statuses": [post(each).status_code for each in ("before", "first", "second")],
            "phases": list(client.get("/version", headers={"x-api-key": key}).json()["phases"]),
        }), flush=True)

for key in ("first", "second"):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            restored(key)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.fixture(scope="module")
def snapshot(demo_model):
    environment = {"SERVE_MODEL": str(demo_model), "SERVE_API_KEYS": "before", "SERVE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment, "SERVE_MAX_MODEL_LEN": "256", "SERVE_MAX_BATCH_SIZE": "2"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_snapshot_holds_weights_but_no_file_and_no_thread(snapshot):
    held, first, _ = snapshot
    assert held["files"] == []
    assert held["threads"] == ["MainThread"]
    assert held["phases"][1:] == ["tokenizer", "fetch", "import_torch", "import_transformers", "weights"]
    done_again = set(held["phases"][1:]) & set(first["phases"])
    assert done_again == {"weights"}  # onto the device
    assert "prepare_weights" in first["phases"]


def test_processes_from_one_snapshot_draw_differently_and_read_their_own_keys(snapshot):
    _, first, second = snapshot
    assert first["text"] != second["text"]
    assert first["statuses"] == [401, 200, 401]
    assert second["statuses"] == [401, 401, 200]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_from_a_snapshot_equal_those_read_straight(tmp_path, stored, wanted):
    import transformers

    folder = tiny_llama(tmp_path / "float32")
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(tmp_path / "stored")
    files, config, cpu = load(folder).files, EngineConfig(), torch.device("cpu")
    object.__setattr__(files, "folder", tmp_path / "stored")
    straight = load_model(files, wanted, cpu, config)
    prepared = load_detached(files, config)
    assert prepared.dtype == stored
    moved = load_model(files, wanted, cpu, config, prepared)
    expected = {**dict(straight.named_parameters()), **dict(straight.named_buffers())}
    got = {**dict(moved.named_parameters()), **dict(moved.named_buffers())}
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def test_quantised_checkpoint_is_left_to_the_second_stage(tmp_path):
    folder = tiny_llama(tmp_path)
    files = load(folder).files
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert load_detached(files, EngineConfig()) is None
