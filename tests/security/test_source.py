"""What the source may not contain: ways to run code that came from outside."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
MODAL = {"trimaran/emulate/modal/container.py", "trimaran/emulate/modal/calls.py"}
"""Modal's own client sends pickles to its control plane: the emulator on loopback has to read them."""
SHELL = {"trimaran/verify/redeploy.py"}
"""Runs what its user wrote after `--redeploy`, in that user's shell; nothing of it comes from elsewhere."""

TEXT = {"serve/engine/program.py"}
"""Numbers and names of its own: tests/engine/test_replay.py holds it to that."""


@cache
def files() -> list[tuple[str, ast.Module]]:
    paths = [path for folder in ("serve", "trimaran", "deploy") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def test_source_opens_no_pickle() -> None:
    """CVE-2025-32444, CVE-2026-31221."""
    for name, tree in files():
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if found := {module.partition(".")[0] for module in modules} & FORBIDDEN:
                assert name in MODAL, f"{name} imports {found}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "numpy.load", "np.load"}:
                raise AssertionError(f"{name}:{node.lineno} loads a file that may hold code")


def test_source_runs_no_text() -> None:
    for name, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                runs_text = called in {"eval", "exec", "os.system", "os.popen"} and name not in TEXT
                assert not runs_text, f"{name}:{node.lineno} calls {called}"
                shell = [word.value for word in node.keywords if word.arg == "shell"]
                assert name in SHELL or not any(isinstance(value, ast.Constant) and value.value for value in shell), (
                    f"{name} uses a shell"
                )


def test_locks_pin_every_package_to_one_version() -> None:
    """No ranges, no addresses, no repositories: what is installed is what was tested."""
    for lock in ("requirements.lock", "requirements-dev.lock"):
        lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()
        packages = [line for line in lines if not line.startswith(("#", "-r "))]
        assert len(packages) > 20
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", line) for line in packages), lock
