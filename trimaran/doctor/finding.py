"""What the doctor looks at, and what it says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.settings import Settings
    from serve.weights import ModelSource
    from trimaran.plan.need import Need


TITLES = {"modal": "Modal", "runpod": "RunPod", "render": "Render"}
"""Platforms as they write themselves."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that will go wrong: a short name, what it is, why it hurts, and the command that mends it."""

    name: str
    what: str
    why: str
    mend: str


Findings = Iterator[Finding]


@dataclass(kw_only=True)
class Situation:
    """A deployment as it is meant: settings, the platform's own options, and this machine's environment.

    ``gpus`` are names of the platform's: GPUs of Modal, pools of RunPod.  ``source`` and ``need`` come from the
    model's files once they were found good.
    """

    settings: Settings
    platform: str | None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    gpus: tuple[str, ...] = ()
    plan: str | None = None
    image: str | None = None
    mode: str = "queue"
    name: str = "trimaran"
    min_cuda: str | None = None
    disk_gb: int | None = None
    shutdown_delay_s: int = 120
    blueprint: Path | None = None
    torch_index: str | None = None
    extras: str | None = None
    source: ModelSource | None = None
    need: Need | None = None

    @property
    def where(self) -> str:
        """The platform's name; empty: this machine."""
        return TITLES.get(self.platform or "", "")

    def as_variable(self, setting: str, value: Any) -> str:
        """How a setting is mended."""
        return f"export SERVE_{setting.upper()}={value}"
