"""A page's table as a picture: groups of bars, each group to a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0ea5e9", "#94a3b8", "#6366f1", "#f59e0b")
LEFT, WIDTH, BAR, GAP = 300, 560, 22, 44

Group = tuple[str, Mapping[str, float]]
"""Its title, and a number for each name."""


def picture(title: str, unit: str, groups: Sequence[Group]) -> str:
    """An SVG: names keep their colour through all groups; shorter is better."""
    names = list(dict.fromkeys(name for _, values in groups for name in values))
    parts, y = [f'<text x="20" y="34" font-size="17" fill="#0f172a">{escape(title)}</text>'], 64
    for heading, values in groups:
        parts.append(f'<text x="20" y="{y + 10}" font-size="14" fill="#0f172a">{escape(heading)}</text>')
        y += 20
        for name, value in values.items():
            width = WIDTH * value / max(values.values())
            colour = COLOURS[names.index(name) % len(COLOURS)]
            text = f'y="{y + 14}" font-size="12"'
            parts += [
                f'<text x="{LEFT - 8}" {text} fill="#475569" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 4}" fill="{colour}"/>',
                f'<text x="{LEFT + width + 6:.1f}" {text} fill="#0f172a">{value:.2f} {unit}</text>',
            ]
            y += BAR
        y += GAP - BAR
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 100} {y}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"
