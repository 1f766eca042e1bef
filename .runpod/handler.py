"""RunPod's Hub looks for a handler here; the worker itself is deploy/runpod/handler.py.  Made by scripts/reference."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "deploy" / "runpod" / "handler.py"), run_name="__main__")
