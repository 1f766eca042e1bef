"""The phases of cold starts as bars in an SVG: one row for each start, all to one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = {
    "container": "#475569",
    "process_start": "#94a3b8",
    "tokenizer": "#f59e0b",
    "fetch": "#eab308",
    "import_torch": "#0ea5e9",
    "import_transformers": "#6366f1",
    "embedding_model": "#14b8a6",
    "weights": "#10b981",
    "to_device": "#059669",
    "pack": "#84cc16",
    "probe": "#a855f7",
    "kv_cache": "#ec4899",
    "warm_up": "#ef4444",
    "cuda_graphs": "#f97316",
    "first_token": "#b91c1c",
    "other": "#cbd5e1",
}
LEFT, WIDTH, BAR, ROW = 210, 900, 34, 78
MIN_LABELLED = 34

Row = tuple[str, str, Mapping[str, float]]
"""Title, remark, and seconds of each phase by its name."""


def picture(title: str, rows: Sequence[Row]) -> str:
    """One bar for each row, its phases one after the other in the order of ``COLOURS``."""
    longest = max(total(phases) for _, _, phases in rows) or 1.0
    height = 60 + ROW * len(rows) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 90} {height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="20" y="34" font-size="17" fill="#0f172a">{escape(title)}</text>',
    ]
    for index, row in enumerate(rows):
        parts += _bar(row, 60 + ROW * index, WIDTH / longest)
    shown = [name for name in COLOURS if any(phases.get(name) for _, _, phases in rows)]
    return "\n".join([*parts, *_legend(shown, height - 34), "</svg>"]) + "\n"


def total(phases: Mapping[str, float]) -> float:
    """Seconds of the phases that are drawn."""
    return sum(seconds for name, seconds in phases.items() if name in COLOURS)


def _bar(row: Row, y: int, scale: float) -> list[str]:
    title, remark, phases = row
    x = float(LEFT)
    parts = [
        f'<text x="20" y="{y + 15}" font-size="15" fill="#0f172a">{escape(title)}</text>',
        f'<text x="20" y="{y + 33}" font-size="12" fill="#475569">{escape(remark)}</text>',
    ]
    for name, colour in COLOURS.items():
        if not (seconds := phases.get(name, 0.0)):
            continue
        width = seconds * scale
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}">'
            f"<title>{name}: {seconds:.2f} s</title></rect>"
        )
        if width > MIN_LABELLED:
            parts.append(
                f'<text x="{x + width / 2:.1f}" y="{y + 22}" font-size="12" fill="#ffffff" text-anchor="middle">'
                f"{seconds:.1f}</text>"
            )
        x += width
    parts.append(f'<text x="{x + 8:.1f}" y="{y + 22}" font-size="14" fill="#0f172a">{total(phases):.1f} s</text>')
    return parts


def _legend(names: Sequence[str], y: int) -> list[str]:
    parts: list[str] = []
    x = 20.0
    for name in names:
        parts.append(f'<rect x="{x:.0f}" y="{y}" width="12" height="12" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="{y + 11}" font-size="12" fill="#0f172a">{name}</text>')
        x += 32 + 7 * len(name)
    return parts
