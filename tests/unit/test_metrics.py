"""The GPU's driver is asked in a thread, and waited for only so long; the dashboard's panels do not overlap."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

from serve.engine.device import gpu_memory
from serve.metrics import GpuMemory


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


def test_dashboard_panels_do_not_lie_on_each_other() -> None:
    dashboard = json.loads((Path(__file__).parents[2] / "deploy/grafana/trimaran.json").read_text())
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    squares = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(squares) == len(set(squares))
    assert max(x for x, _ in squares) == 23
