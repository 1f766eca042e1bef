"""Draws docs/images/modal-cold-start.svg for ``scripts/pictures``: measured phases of starts in the Modal emulator."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path

from trimaran import demo_model
from trimaran.emulate.modal.service import Emulator
from trimaran.emulate.modal.session import deploy, prepare_environment, start, wait_until_ready

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "modal-cold-start.svg"
COLOURS = {
    "process_start": "#94a3b8",
    "tokenizer": "#f59e0b",
    "import_torch": "#0ea5e9",
    "import_transformers": "#6366f1",
    "weights": "#10b981",
    "pack": "#84cc16",
    "probe": "#a855f7",
    "kv_cache": "#ec4899",
    "warm_up": "#ef4444",
}
LEFT, WIDTH, BAR, ROW = 210, 900, 34, 78


def main() -> int:
    """Measure, then draw."""
    model = str(demo_model.prepare())
    straight, snapshot = measure(model, "off"), measure(model, "cpu")
    before = {name.removeprefix("prepare_"): s for name, s in snapshot.items() if name.startswith("prepare_")}
    after = {name: seconds for name, seconds in snapshot.items() if not name.startswith("prepare_")}
    rows = [
        ("Without a snapshot", "each start", straight),
        ("Before the snapshot", "once, then frozen", before),
        ("After the restore", "each start", after),
    ]
    PICTURE.write_text(picture(rows), encoding="utf-8")
    print(f"{PICTURE.relative_to(PICTURE.parents[2])}  {PICTURE.stat().st_size // 1024} KiB")
    return 0


def measure(model: str, snapshot: str) -> dict[str, float]:
    """The phases of one start in the real container entry point."""
    environment, key = prepare_environment(model)
    with Emulator() as emulator:
        deploy(emulator, environment | {"SERVE_MODAL_SNAPSHOT": snapshot})
        container = start(emulator)
        try:
            wait_until_ready(container, key)
            request = urllib.request.Request(f"{container.url}/version", headers={"x-api-key": key})  # noqa: S310
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                return json.load(answer)["phases"]
        finally:
            container.stop()


def picture(rows: list[tuple[str, str, dict[str, float]]]) -> str:
    """One bar for each row, its phases one after the other, to the same scale."""
    longest = max(sum(seconds for name, seconds in phases.items() if name in COLOURS) for _, _, phases in rows)
    height = 60 + ROW * len(rows) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 90} {height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="20" y="34" font-size="17" fill="#0f172a">{demo_model.NAME}, no GPU, {os.cpu_count()} cores, '
        "in the emulator. Freezing and thawing are Modal's, and not in the figures.</text>",
    ]
    for index, (title, remark, phases) in enumerate(rows):
        y, x = 60 + ROW * index, float(LEFT)
        parts.append(f'<text x="20" y="{y + 15}" font-size="15" fill="#0f172a">{title}</text>')
        parts.append(f'<text x="20" y="{y + 33}" font-size="12" fill="#475569">{remark}</text>')
        for name in COLOURS:
            if not (seconds := phases.get(name, 0.0)):
                continue
            width = seconds / longest * WIDTH
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[name]}">'
                f"<title>{name}: {seconds:.2f} s</title></rect>"
            )
            if width > 34:
                parts.append(
                    f'<text x="{x + width / 2:.1f}" y="{y + 22}" font-size="12" fill="#ffffff" text-anchor="middle">'
                    f"{seconds:.1f}</text>"
                )
            x += width
        total = sum(seconds for name, seconds in phases.items() if name in COLOURS)
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 22}" font-size="14" fill="#0f172a">{total:.1f} s</text>')
    x = 20.0
    for name, colour in COLOURS.items():
        parts.append(f'<rect x="{x:.0f}" y="{height - 34}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="{height - 23}" font-size="12" fill="#0f172a">{name}</text>')
        x += 42 + 7 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
