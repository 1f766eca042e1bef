"""``python -m serve.compare``: while an image with a model in it is built, make the comparison of its first start.

The verdict goes beside the model, where every start finds it.  For the CPU only: a build has no GPU, so there the first
start on each kind of card compares.  What cannot be compared here is no error, and the reason is said.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from serve.checkpoint import is_quantized, stored_dtype
from serve.engine.base import EngineConfig, ModelFiles
from serve.engine.device import available_ram
from serve.engine.verdicts import BESIDE
from serve.errors import ServeError
from serve.settings import load_settings
from serve.source import CheckpointOrigin

FORMATS = ("float32", "bfloat16")
"""What ``auto`` chooses on a CPU; which of them depends on the machine that will serve."""
HEADROOM = 1.5
"""Weights, and what a pass of a few tokens computes."""


def main() -> int:
    """Compare ``SERVE_MODEL``; return the exit status (1: it cannot be served, and why)."""
    try:
        settings = load_settings(host="127.0.0.1")
        if find_spec("torch") is None:
            return _say("nothing is compared: this image has no torch")
        origin = CheckpointOrigin(settings)
        files = origin.fetch(origin.load_tokenizer())
        config = settings.engine_config()
        for name in FORMATS if config.dtype == "auto" else (config.dtype,):
            _say(f"{settings.model} in {name}: {compared(files, config, name)}")
    except ServeError as error:
        _say(error.message)
        return 1
    return 0


def compared(files: ModelFiles, config: EngineConfig, dtype_name: str) -> str:
    """Compare in one number format and keep the verdict; what came of it, in words."""
    import torch  # noqa: PLC0415

    from serve.engine import gate, loader  # noqa: PLC0415
    from serve.engine.survey import NotBatchable  # noqa: PLC0415

    if torch.version.cuda is not None:
        return "not compared: this torch is for GPUs, so the first start on one compares"
    raw, dtype = loader.read_config(files.folder), getattr(torch, dtype_name)
    if is_quantized(raw):
        return "not compared: its number format depends on the machine that serves"
    needed = files.num_bytes * dtype.itemsize / getattr(torch, stored_dtype(raw) or "float32").itemsize * HEADROOM
    if needed > (free := available_ram()):
        return f"not compared: it takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free here"
    device = torch.device("cpu")
    loader.import_transformers()
    with torch.inference_mode():
        model = loader.load_model(files, dtype, device, config)
        try:
            gate.examine(model, gate.verdict_file(files, dtype, device, files.folder / BESIDE))
        except NotBatchable as reason:
            return f"compared; it will run one request at a time: {reason}"
    return "compared; it will run in batches"


def _say(text: str) -> int:
    sys.stderr.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
