"""A cold start as spans, from what ``/version`` says and what a client saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimaran.plan.machines import boot_s
from trimaran.table import table

BEFORE = "prepare_"
"""The server's prefix for what was done before a memory snapshot."""

WEIGHTS = frozenset({"weights", "to_device"})
WIDTH = 40
MIN_OTHER_S = 0.05

LABELS = {
    "container": "container",
    "process_start": "interpreter, imports of the server",
    "tokenizer": "tokenizer",
    "fetch": "weights: find or fetch",
    "import_torch": "imports: torch",
    "import_transformers": "imports: transformers",
    "embedding_model": "embedding model",
    "weights": "weights: read",
    "to_device": "weights: move to device",
    "pack": "weights: pack for the CPU",
    "probe": "probe",
    "kv_cache": "KV cache",
    "warm_up": "warm-up",
    "cuda_graphs": "CUDA graphs",
    "other": "between the phases",
    "first_token": "first token",
}


@dataclass(frozen=True, slots=True)
class Span:
    """One phase: when it began, in seconds from the start, and how long it took."""

    name: str
    begins: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Trace:
    """A start.

    ``container_s`` is None where the server ran already when it was asked.  ``weights`` is what ``/version``
    says of them: ``source`` and ``bytes``, or None.  ``before_snapshot_s`` was spent once, before memory was frozen.
    """

    model: str
    engine: str
    spans: tuple[Span, ...]
    container_s: float | None
    weights: Mapping[str, Any] | None
    before_snapshot_s: float
    has_gpu: bool = False

    @property
    def total_s(self) -> float:
        """From the start, as far as it was seen, to the first token."""
        return sum(span.seconds for span in self.spans)

    @property
    def gb_per_s(self) -> float | None:
        """How fast weights came from where they were into place; None where the server does not say how many bytes."""
        seconds = next((span.seconds for span in self.spans if span.name in WEIGHTS), 0.0)
        num_bytes = (self.weights or {}).get("bytes") or 0
        return num_bytes / seconds / 1e9 if num_bytes and seconds else None

    @property
    def predicted_s(self) -> float | None:
        """What ``trimaran plan`` takes for a boot of this size; None where the server does not say how many bytes."""
        num_bytes = (self.weights or {}).get("bytes")
        return boot_s(num_bytes) if num_bytes else None

    def phases(self) -> dict[str, float]:
        """Seconds by name."""
        return {span.name: span.seconds for span in self.spans}

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "model": self.model,
            "engine": self.engine,
            "total_s": round(self.total_s, 4),
            "predicted_s": self.predicted_s,
            "container_s": self.container_s,
            "weights": {**self.weights, "gb_per_s": self.gb_per_s} if self.weights else None,
            "before_snapshot_s": self.before_snapshot_s,
            "spans": [
                {"name": span.name, "begins": round(span.begins, 4), "seconds": round(span.seconds, 4)}
                for span in self.spans
            ],
        }


def make_trace(version: Mapping[str, Any], container_s: float | None, first_token_s: float) -> Trace:
    """Put the parts one after the other, as they happened.

    Args:
        version: The answer of ``/version`` of a server that is ready.
        container_s: From the request that woke it to the birth of its process.
        first_token_s: Of the first request that was answered.
    """
    said: Mapping[str, float] = version["phases"]
    before = {name: seconds for name, seconds in said.items() if name.startswith(BEFORE)}
    phases = {name: seconds for name, seconds in said.items() if name not in before and name != "total"}
    other = said.get("total", 0.0) - sum(phases.values())
    parts = {**({"container": container_s} if container_s is not None else {}), **phases}
    parts |= {"other": other} if other >= MIN_OTHER_S else {}
    parts["first_token"] = first_token_s
    if before and on_gpu(version):  # they lay in the snapshot's main memory
        parts = {"to_device" if name == "weights" else name: seconds for name, seconds in parts.items()}
    spans: list[Span] = []
    begins = 0.0
    for name, seconds in parts.items():
        spans.append(Span(name, begins, seconds))
        begins += seconds
    return Trace(
        model=str(version["model"]),
        engine=str(version["engine"]),
        spans=tuple(spans),
        container_s=container_s,
        weights=version.get("weights"),
        before_snapshot_s=round(sum(before.values()), 4),
        has_gpu=on_gpu(version),
    )


def on_gpu(version: Mapping[str, Any]) -> bool:
    """Whether the model went to a GPU: on a CPU its layers are packed, or that is tried."""
    return version["engine"] == "transformers" and "pack" not in version["phases"]


def text(trace: Trace, *, is_local: bool = False) -> str:
    """A table with a bar for each phase, on one scale."""
    rows = [(*_cells(span, trace), _bar(span, trace.total_s)) for span in trace.spans]
    lines = [table(("phase", "begins", "seconds", "note", ""), rows)]
    begin = "the request that woke it" if trace.container_s is not None else "the birth of its process"
    lines.append(f"\n{trace.model}: {trace.total_s:.2f} s from {begin} to the first token")
    if trace.container_s is None and not is_local:
        lines.append("It ran already when it was asked: the wait for a container is not in the figures.")
    if trace.predicted_s is not None:
        lines.append(f"trimaran plan predicts {trace.predicted_s:.0f} s for a boot of so many bytes, until measured.")
    if trace.before_snapshot_s:
        lines.append(f"Before its memory snapshot, once: {trace.before_snapshot_s:.2f} s, not in the figures.")
    return "\n".join(lines)


def _cells(span: Span, trace: Trace) -> tuple[str, str, str, str]:
    note = ""
    if span.name in WEIGHTS and trace.weights and (speed := trace.gb_per_s):
        note = f"{trace.weights['source']}, {trace.weights['bytes'] / 1e9:.2f} GB, {speed:.2f} GB/s"
        note += ", from memory" if trace.before_snapshot_s else ", straight to the device" if trace.has_gpu else ""
    return LABELS.get(span.name, span.name), f"{span.begins:.2f}", f"{span.seconds:.2f}", note


def _bar(span: Span, total_s: float) -> str:
    scale = WIDTH / total_s if total_s else 0.0
    return " " * int(span.begins * scale) + "█" * max(1, round(span.seconds * scale))
