"""The GPU's driver is asked in a thread, and waited for only so long; the dashboard asks for metrics that there are."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path

from serve.api.app import create_app
from serve.engine.device import gpu_memory
from serve.metrics import GpuMemory
from serve.settings import Settings


def test_gpu_memory_is_what_was_heard_last() -> None:
    answers, go = iter([{"free": 1}, {"free": 2}]), threading.Event()

    def ask() -> dict[str, int]:
        answer = next(answers)
        if answer["free"] == 2:
            go.wait(10)
        return answer

    async def scrape() -> list[float]:
        memory = GpuMemory(ask)
        seen: list[float] = []
        while len(seen) < 2 or seen[-1] == 1:
            await memory.sample()
            seen += [sample.value for metric in memory.collect() for sample in metric.samples]
            if len(seen) >= 2:
                go.set()
        return seen

    assert sorted(set(asyncio.run(scrape()))) == [1, 2]


def test_gpu_memory_is_absent_without_a_gpu() -> None:
    assert gpu_memory() == {}
    assert not list(GpuMemory().collect())


def test_dashboard_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    app = create_app(Settings(engine="echo", records_url=f"sqlite:///{tmp_path}/usage.db", _env_file=None))  # pyright: ignore[reportCallIssue, reportArgumentType]
    page = asyncio.run(app.state.metrics.text()).decode()
    known = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE)) | {"trimaran_gpu_memory_bytes"}
    known |= {f"{name}_bucket" for name in known}
    dashboard = json.loads((Path(__file__).parents[2] / "deploy/grafana/trimaran.json").read_text())
    asked = set(re.findall(r"trimaran_\w+", json.dumps([panel.get("targets") for panel in dashboard["panels"]])))

    assert len(asked) > 15
    assert asked <= known
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    squares = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(squares) == len(set(squares))  # no panel lies on another
    assert max(x for x, _ in squares) == 23
