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
from trimaran.trace.picture import picture

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "modal-cold-start.svg"


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
    title = (
        f"{demo_model.NAME}, no GPU, {os.cpu_count()} cores, in the emulator. "
        "Freezing and thawing are Modal's, and not in the figures."
    )
    PICTURE.write_text(picture(title, rows), encoding="utf-8")
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


if __name__ == "__main__":
    sys.exit(main())
