"""Draws docs/images/dashboard.png for ``scripts/pictures``: the Grafana dashboard, its data from a real Prometheus.

A server with the echo engine gets mixed traffic at twice its capacity; Prometheus scrapes it and evaluates every panel.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from bench.dashboard import Series, evaluate, panels, prometheus
from bench.processes import HOST, free_port, server, wait_until_ready
from bench.soak import SLOW_ECHO, Storm, run_storm

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "dashboard.png"
SECONDS, RATE_S = 90, 15
INK, PALE, PAPER, CARD = "#d8d9da", "#8e9297", "#111217", "#181b1f"
CHARACTER, LEGEND_ROW = 0.0043, 0.5
"""The width of one in a legend, of the figure's; the height of a legend's line, of a row's."""
COLORS = ("#73bf69", "#f2cc0c", "#ff780a", "#5794f2", "#b877d9", "#f2495c", "#8ab8ff", "#96d98d", "#ffa6b0", "#c0d8ff")


def main() -> int:
    """Return the exit status."""
    executable = shutil.which("prometheus")
    if executable is None:
        print("dashboard.png stays: Prometheus is missing.  Debian, Ubuntu: sudo apt-get install prometheus")
        return 0
    with tempfile.TemporaryDirectory() as name:
        drawn = gather(executable, Path(name))
    draw(drawn)
    print(f"{PICTURE.relative_to(PICTURE.parents[2])}  {PICTURE.stat().st_size // 1024} KiB")
    return 0


def gather(executable: str, folder: Path) -> list[tuple[dict[str, Any], list[Series]]]:
    """Load a server, and ask Prometheus for each panel."""
    port, key = free_port(), "sk-dashboard"
    environment = {"SERVE_ENGINE": "echo", "SERVE_PORT": str(port), "SERVE_API_KEYS": key, "SERVE_MAX_BATCH_SIZE": "4"}
    environment |= {"SERVE_MAX_QUEUE": "4", "SERVE_RECORDS_URL": f"sqlite:///{folder}/usage.db"}
    url = f"http://{HOST}:{port}"
    with (
        server(
            [sys.executable, "-c", SLOW_ECHO], environment | {"PYTHONPATH": str(Path(__file__).parents[1])}
        ) as process,
        prometheus(executable, url, key, folder) as address,
    ):
        wait_until_ready(process, port, "/ready")
        storm = Storm(url, "echo", {"authorization": f"Bearer {key}"}, 400, random.Random(3))  # noqa: S311
        began = time.time()
        asyncio.run(run_storm(storm, SECONDS, 12, None))
        return [(panel, evaluate(address, panel, began + RATE_S, began + SECONDS, RATE_S)) for panel in panels()]


def draw(drawn: list[tuple[dict[str, Any], list[Series]]]) -> None:
    """Each panel in its place."""
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel, _ in drawn)
    figure = Figure(figsize=(15, height * 0.36), facecolor=PAPER)
    for panel, series in drawn:
        at = panel["gridPos"]
        box = (at["x"] / 24, 1 - (at["y"] + at["h"]) / height, at["w"] / 24, at["h"] / height)
        if panel["type"] == "row":
            figure.text(0.008, box[1] + box[3] / 2, panel["title"], color=INK, size=11, weight="bold", va="center")
            continue
        draw_panel(figure, panel, series, box, height)
    figure.savefig(PICTURE, dpi=90)


def draw_panel(
    figure: Figure, panel: dict[str, Any], series: list[Series], box: tuple[float, float, float, float], height: int
) -> None:
    """A card with its title, and in it what the panel shows."""
    left, bottom, width, tall = box
    gap_x, gap_y, row = 0.003, 0.1 / height, 1 / height
    card = figure.add_axes((left + gap_x, bottom + gap_y, width - 2 * gap_x, tall - 2 * gap_y), facecolor=CARD)
    card.set(xticks=[], yticks=[])
    for spine in card.spines.values():
        spine.set_color("#2c3036")
    figure.text(left + 0.008, bottom + tall - 0.6 * row, panel["title"], color=INK, size=9, va="center")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    shown = [line for line in series if any(not math.isnan(value) for _, value in line.points)]
    middle = left + width / 2, bottom + tall / 2 - row / 2
    if not shown:
        figure.text(*middle, "No data", color=PALE, size=10, ha="center", va="center")
    elif panel["type"] == "stat":
        text = written(shown[0].points[-1][1], unit)
        figure.text(*middle, text, color=COLORS[0], size=22, ha="center", va="center")
    elif panel["type"] == "timeseries":
        lines = draw_legend(figure, [line.name for line in shown], (left, bottom, width), row)
        inner = left + 0.05, bottom + (0.9 + LEGEND_ROW * lines) * row
        axes = figure.add_axes((*inner, width - 0.06, bottom + tall - 1.2 * row - inner[1]), facecolor=CARD)
        draw_lines(axes, panel, shown, unit)
    else:
        names = 0.012 + CHARACTER * max(len(line.name) for line in shown)
        axes = figure.add_axes(
            (left + names, bottom + 0.6 * row, width - names - 0.01, tall - 1.8 * row), facecolor=CARD
        )
        draw_bars(axes, shown, unit)


def draw_legend(figure: Figure, names: list[str], at: tuple[float, float, float], row: float) -> int:
    """Names and their colors at the foot of a card, in as many columns as fit; returns the number of lines."""
    left, bottom, width = at
    column = CHARACTER * max(map(len, names)) + 0.025
    columns = max(1, min(len(names), int((width - 0.01) / column)))
    lines = math.ceil(len(names) / columns)
    for number, (name, color) in enumerate(zip(names, cycle(COLORS), strict=False)):
        x, y = (
            left + 0.008 + number % columns * column,
            bottom + (LEGEND_ROW * (lines - number // columns) - 0.05) * row,
        )
        figure.add_artist(Rectangle((x, y - 0.05 * row), 0.01, 0.1 * row, color=color))
        figure.text(x + 0.014, y, name, color=INK, size=7, va="center")
    return lines


def draw_lines(axes: Axes, panel: dict[str, Any], series: list[Series], unit: str) -> None:
    """Values over time."""
    start = min(line.points[0][0] for line in series)
    if "stacking" in panel["fieldConfig"]["defaults"]["custom"]:
        grid = sorted({at for line in series for at, _ in line.points})
        found = [dict(line.points) for line in series]
        heights = [[values.get(at, 0.0) for at in grid] for values in found]
        axes.stackplot([at - start for at in grid], heights, colors=COLORS, alpha=0.6)
    else:
        for color, line in zip(cycle(COLORS), series, strict=False):
            axes.plot([at - start for at, _ in line.points], [value for _, value in line.points], color=color, lw=1.2)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=PALE, labelsize=7, length=0)
    axes.yaxis.set_major_formatter(lambda value, _: written(value, unit))
    axes.xaxis.set_major_formatter(lambda value, _: f"{datetime.fromtimestamp(start + value, UTC):%H:%M:%S}")
    axes.xaxis.set_major_locator(MaxNLocator(5, prune="both"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(color="#2c3036", lw=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0)
    for side in axes.spines.values():
        side.set_visible(False)


def draw_bars(axes: Axes, series: list[Series], unit: str) -> None:
    """The last value of each, as a bar."""
    names, values = [line.name for line in series], [line.points[-1][1] for line in series]
    axes.barh(names, values, color=COLORS[0], height=0.6)
    for at, value in enumerate(values):
        axes.text(value, at, f" {written(value, unit)}", color=INK, size=7, va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.25 or 1)
    axes.tick_params(colors=PALE, labelsize=7, length=0)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def written(value: float, unit: str) -> str:
    """A value as Grafana writes it in a panel of that unit."""
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s":
        scale, name = (1, "s") if value >= 1 or not value else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
        return f"{scale * value:.3g} {name}"
    if unit == "bytes":
        return f"{value / 2**30:.3g} GiB"
    return f"{value:,.4g}" + (" req/s" if unit == "reqps" else "")


if __name__ == "__main__":
    sys.exit(main())
