"""``trimaran trace`` against real servers: phases, bytes and times agree with what was seen; each failure is told."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from runpod_local import LocalRunpod, local_runpod

from trimaran.cli import main
from trimaran.trace.picture import COLOURS, picture
from trimaran.trace.waterfall import LABELS, make_trace, text

ROOT = Path(__file__).parents[2]


def run(*arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(main, ["trace", *arguments])
    assert done.exit_code == status, (done.output, done.exception)
    return done


def test_spans_follow_each_other_and_sum_up():
    phases = {"process_start": 0.5, "tokenizer": 0.1, "import_torch": 2.0, "weights": 1.0, "total": 4.0}
    weights = {"source": "hub", "bytes": 3 * 10**9}
    version = {"model": "m", "engine": "transformers", "phases": phases, "weights": weights}
    made = make_trace(version, 7.0, 0.3)
    assert [span.name for span in made.spans][-2:] == ["other", "first_token"]
    assert made.total_s == pytest.approx(7.0 + 4.0 + 0.3)
    for before, after in zip(made.spans, made.spans[1:], strict=False):
        assert after.begins == pytest.approx(before.begins + before.seconds)
    assert made.gb_per_s == pytest.approx(3.0)
    assert "hub, 3.00 GB, 3.00 GB/s" in text(made)


def test_what_was_done_before_a_snapshot_is_not_in_the_sum():
    phases = {"prepare_weights": 9.0, "prepare_process_start": 1.0, "process_start": 0.0, "weights": 0.4, "total": 0.4}
    made = make_trace({"model": "m", "engine": "transformers", "phases": phases}, None, 0.1)
    assert (made.total_s, made.before_snapshot_s) == (pytest.approx(0.5), 10.0)
    assert "Before its memory snapshot, once: 10.00 s" in text(made)
    assert "It ran already" in text(made)
    assert "It ran already" not in text(made, is_local=True)


def test_move_to_the_device_is_a_bar_of_its_own_where_it_is_timed():
    """After a snapshot the weights lie in main memory: what is timed then is their way to the GPU."""
    phases = {"prepare_weights": 9.0, "process_start": 0.0, "weights": 0.4, "cuda_graphs": 2.0, "total": 2.4}
    weights = {"source": "cache", "bytes": 4 * 10**8}
    version = {"model": "m", "engine": "transformers", "phases": phases, "weights": weights}
    made = make_trace(version, None, 0.1)
    assert made.phases()["to_device"] == 0.4
    assert "weights" not in made.phases()
    assert "weights: move to device" in text(made)
    assert "cache, 0.40 GB, 1.00 GB/s, from memory" in text(made)
    drawn = picture("title", [("Seen", "", made.phases())])
    assert "to_device: 0.40 s" in drawn
    assert "cuda_graphs: 2.00 s" in drawn


def test_table_says_when_weights_went_straight_to_the_device():
    weights = {"source": "local", "bytes": 4 * 10**8}
    version = {"model": "m", "engine": "transformers", "phases": {"weights": 0.4, "total": 0.4}, "weights": weights}
    assert "1.00 GB/s, straight to the device" in text(make_trace(version, None, 0.1))
    on_cpu = {**version, "phases": {"weights": 0.4, "pack": 0.1, "total": 0.5}}
    assert "device" not in text(make_trace(on_cpu, None, 0.1))


def test_every_phase_that_the_server_times_has_a_label_and_a_colour():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "serve").rglob("*.py")]
    timed = {name for source in sources for name in re.findall(r"phase\(\"(\w+)\"\)", source)}
    assert {"weights", "cuda_graphs", "embedding_model"} <= timed
    assert timed <= COLOURS.keys()
    assert timed <= LABELS.keys()
    assert COLOURS.keys() == LABELS.keys()


def test_worker_behind_runpods_queue_is_traced(runpod: LocalRunpod, monkeypatch):
    monkeypatch.setenv("RUNPOD_API_KEY", runpod.plane.key)
    monkeypatch.setenv("SERVE_API_KEYS", "sk-not-runpods")
    for address in (runpod.base, runpod.base + "/openai/v1"):
        made = json.loads(run(address, "--json").stdout)
        assert made["engine"] == "echo"
        assert {"process_start", "first_token"} <= {span["name"] for span in made["spans"]}
    assert "RunPod answers 401: give --key" in run(runpod.base, "--key", "wrong", status=2).stderr
    assert "is the endpoint's id right" in run(runpod.url + "/v2/other", status=2).stderr


def test_queue_without_a_worker_is_given_up(monkeypatch):
    with local_runpod() as empty:
        monkeypatch.setenv("RUNPOD_API_KEY", empty.plane.key)
        done = run(empty.base, "--wait", "1", status=1)
        assert "no worker answered in 1 s" in done.stderr
        assert [job.status.value for job in empty.plane.board.jobs.values()] == ["CANCELLED"]


def test_local_trace_of_real_weights_agrees_with_the_files(demo_model, tmp_path):
    began = time.monotonic()
    done = run("--local", str(demo_model), "--json", "--svg", str(tmp_path / "trace.svg"))
    seen = time.monotonic() - began
    made = json.loads(done.stdout)
    spans = {span["name"]: span["seconds"] for span in made["spans"]}
    assert {"process_start", "import_torch", "import_transformers", "weights", "warm_up", "first_token"} <= spans.keys()
    assert sum(spans.values()) == pytest.approx(made["total_s"], abs=0.01)
    assert made["total_s"] < seen
    assert made["predicted_s"] > 20
    size = sum(file.stat().st_size for file in demo_model.glob("*.safetensors"))
    assert (made["weights"]["source"], made["weights"]["bytes"]) == ("local", size)
    assert made["weights"]["gb_per_s"] == pytest.approx(size / spans["weights"] / 1e9, rel=0.01)
    drawn = ElementTree.fromstring((tmp_path / "trace.svg").read_text())  # noqa: S314 - our own
    titles = [element.text or "" for element in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("import_torch: ") for title in titles)


def test_container_that_sleeps_is_woken_and_its_wait_is_measured(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [sys.executable, "-m", "serve", "--engine=echo", f"--port={port}", "--host=127.0.0.1"]
    started: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "SERVE_API_KEYS": "sk-woken"}
    wait = threading.Timer(2.5, lambda: started.append(subprocess.Popen(arguments, env=environment)))
    monkeypatch.setenv("SERVE_API_KEYS", "sk-woken")
    wait.start()
    try:
        done = run(f"http://127.0.0.1:{port}/v1", "--json", "--wait", "60")
        made = json.loads(done.stdout)
        assert 1 < made["container_s"] < 20
        assert made["spans"][0] == {"name": "container", "begins": 0, "seconds": made["container_s"]}
        assert "Waiting until the server is ready ..." in done.stderr
        again = run(f"http://127.0.0.1:{port}", "--key", "", "--header", "X-Api-Key: sk-woken").stdout
        assert "It ran already when it was asked" in again
        assert "give --key" in run(f"http://127.0.0.1:{port}", "--key", "sk-other", status=2).stderr
    finally:
        wait.join()
        for process in started:
            process.terminate()
            process.wait()


def test_every_failure_has_its_exit_status(tmp_path, monkeypatch):
    assert "--local [MODEL]" in run(status=2).stderr
    assert "NAME:VALUE" in run("http://127.0.0.1:9", "--header", "X", status=2).stderr
    assert (
        "not ready in 1 s; the last answer: ConnectError" in run("http://127.0.0.1:9", "--wait", "1", status=1).stderr
    )
    assert "trimaran run MODEL --port 9" in run("http://localhost:9", status=2).stderr
    monkeypatch.setenv("SERVE_ENGINE", "echo")
    unwritable = str(tmp_path / "no" / "folder.svg")
    assert "cannot be written" in run("--local", "--svg", unwritable, status=2).stderr
    monkeypatch.setenv("SERVE_MAX_QUEUE", "many")
    assert "SERVE_MAX_QUEUE" in run("--local", status=2).stderr
    monkeypatch.delenv("SERVE_MAX_QUEUE")
    monkeypatch.delenv("SERVE_ENGINE")
    (tmp_path / "config.json").write_text("{}")
    assert "trimaran: the server" in run("--local", str(tmp_path), status=3).stderr


def test_address_of_something_else_is_refused():
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        assert "no /version of Trimaran's" in run(f"http://127.0.0.1:{server.server_port}", status=2).stderr
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
