"""Who may import whom.  An AST walk, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = {"torch", "transformers", "numpy", "safetensors", "peft", "gguf"}
WEB = {"fastapi", "starlette", "uvicorn"}
SDKS = {"modal", "runpod", "render"}
DATABASE = {"sqlalchemy", "alembic", "asyncpg", "aiosqlite"}

# Folder or file -> names that must not be imported there (whole modules or prefixes).
FORBIDDEN: dict[str, set[str]] = {
    "serve": SDKS | {"trimaran", "deploy"},
    "serve/types.py": {"serve.api", "serve.chat", "serve.engine", "pydantic"} | WEB | TORCH,
    "serve/errors.py": {"serve", "pydantic"} | WEB | TORCH,
    "serve/engine": {"serve.api", "serve.chat", "serve.settings", "serve.lifecycle", "pydantic"} | WEB,
    "serve/engine/base.py": TORCH,
    "serve/engine/scheduler.py": TORCH | {"asyncio", "threading"},
    "serve/engine/commands.py": TORCH | {"asyncio", "threading"},
    "serve/engine/sequence.py": TORCH | {"asyncio", "threading"},
    "serve/engine/slots.py": TORCH | {"asyncio", "threading"},
    "serve/engine/budget.py": TORCH | {"asyncio", "threading"},
    "serve/engine/turns.py": TORCH | {"asyncio", "threading"},
    "serve/engine/detokenizer.py": TORCH | {"asyncio", "threading"},
    "serve/engine/live.py": TORCH | {"asyncio", "threading"},
    "serve/engine/pulse.py": TORCH | {"asyncio"},
    "serve/engine/sizing.py": TORCH,
    "serve/engine/cgroup.py": TORCH | {"asyncio", "threading", "serve"},
    "serve/engine/steps.py": TORCH | {"asyncio", "threading"},
    "serve/engine/worker.py": TORCH,
    "serve/engine/embedder.py": TORCH | {"asyncio"},
    "serve/engine/embedding_model.py": {"asyncio", "threading"},
    "serve/embedding.py": TORCH | WEB | {"serve.api"},
    "serve/embedding_recipe.py": TORCH | WEB | {"serve.api", "serve.engine"},
    "serve/engine/echo.py": TORCH | {"asyncio"},
    "serve/engine/runner.py": {"asyncio"},
    "serve/engine/loader.py": {"asyncio"},
    "serve/engine/kv_cache.py": {"asyncio", "threading"},
    "serve/engine/lean.py": {"asyncio"},
    "serve/engine/huge_pages.py": TORCH | {"asyncio"},
    "serve/engine/linear.py": {"asyncio", "threading"},
    "serve/engine/compiled.py": {"asyncio"},
    "serve/engine/tiles.py": {"asyncio", "threading"},
    "serve/engine/rows.py": {"asyncio", "threading"},
    "serve/kernels.py": TORCH | WEB | {"serve", "asyncio", "threading"},
    "serve/engine/joint.py": {"asyncio", "threading"},
    "serve/engine/attention.py": {"asyncio", "threading"},
    "serve/engine/blocks.py": {"asyncio", "threading"},
    "serve/engine/flash.py": {"asyncio", "threading"},
    "serve/engine/graphs.py": {"asyncio", "threading"},
    "serve/engine/builder.py": {"asyncio", "threading"},
    "serve/engine/peephole.py": {"asyncio", "threading"},
    "serve/engine/recorder.py": {"asyncio", "threading"},
    "serve/engine/program.py": {"asyncio", "threading"},
    "serve/engine/replay.py": {"asyncio", "threading"},
    "serve/engine/patterns.py": {"asyncio", "threading"},
    "serve/engine/packed.py": {"asyncio", "threading"},
    "serve/engine/parts.py": {"asyncio", "threading"},
    "serve/engine/alone.py": {"asyncio", "threading"},
    "serve/engine/gate.py": {"asyncio", "threading"},
    "serve/engine/survey.py": {"asyncio", "threading"},
    "serve/engine/rope.py": {"asyncio", "threading"},
    "serve/engine/verdicts.py": TORCH | {"asyncio", "threading"},
    "serve/engine/sampler.py": {"asyncio", "threading"},
    "serve/engine/transfer.py": {"asyncio", "threading"},
    "serve/engine/drawing.py": {"asyncio", "threading"},
    "serve/engine/logits.py": {"asyncio", "threading"},
    "serve/engine/logprobs.py": {"asyncio", "threading"},
    "serve/engine/device.py": {"asyncio", "threading"},
    "serve/chat": {"serve.api", "serve.engine", "serve.settings", "serve.lifecycle", "torch"} | WEB,
    "serve/api": TORCH,
    "serve/records": TORCH | WEB | {"serve.api", "serve.engine", "serve.lifecycle", "serve.settings"},
    "serve/records/row.py": DATABASE,
    "serve/records/writer.py": DATABASE,
    "serve/api/usage.py": DATABASE,
    "serve/limits.py": TORCH | WEB | DATABASE | {"serve.api", "serve.engine", "serve.settings", "threading"},
    "serve/sharing": TORCH
    | WEB
    | DATABASE
    | {"serve.api", "serve.engine", "serve.settings", "serve.records", "threading"},
    "serve/keys.py": TORCH | WEB | {"serve.api", "serve.settings", "asyncio", "jwt", "httpx2"},
    "serve/oidc.py": TORCH | WEB | {"serve.api", "serve.settings"},
    "serve/traces.py": TORCH | WEB | {"serve.api", "serve.settings", "threading"},
    "serve/machine_time.py": {"serve", "asyncio", "threading"},
    "serve/watchdog.py": TORCH | WEB | {"serve.api"},
    "serve/lifecycle.py": TORCH | WEB | {"serve.api"},
    "trimaran": {"deploy"},
    "deploy": {"trimaran", "serve.engine", "serve.chat"} | TORCH,
    "deploy/modal": {"runpod", "fastapi", "uvicorn"},
    "deploy/runpod": {"modal", "uvicorn"},
    "trimaran/verify": {"serve.api", "serve.engine"} | SDKS | TORCH,
    "trimaran/emulate/modal": {"runpod"} | TORCH,
    "trimaran/emulate/runpod": {"runpod", "modal"},
}
# Imported at module level they would cost every start seconds; inside a function they are the point.
LAZY_ONLY = TORCH | {"modal", "runpod", "huggingface_hub", "jwt", "opentelemetry"} | DATABASE
LAZY_EXEMPT = {
    "serve/engine/alone.py",
    "serve/engine/attention.py",
    "serve/engine/compiled.py",
    "serve/engine/tiles.py",
    "serve/engine/rows.py",
    "serve/engine/builder.py",
    "serve/engine/blocks.py",
    "serve/engine/drawing.py",
    "serve/engine/flash.py",
    "serve/engine/graphs.py",
    "serve/engine/gate.py",
    "serve/engine/joint.py",
    "serve/engine/kv_cache.py",
    "serve/engine/linear.py",
    "serve/engine/logits.py",
    "serve/engine/logprobs.py",
    "serve/engine/loader.py",
    "serve/engine/packed.py",
    "serve/engine/parts.py",
    "serve/engine/patterns.py",
    "serve/engine/peephole.py",
    "serve/engine/program.py",
    "serve/engine/recorder.py",
    "serve/engine/replay.py",
    "serve/engine/sampler.py",
    "serve/engine/survey.py",
    "serve/engine/transfer.py",
    "serve/records/migrations/env.py",
    "serve/records/limit_table.py",
    "serve/records/migrations/versions/v0001_usage.py",
    "serve/records/migrations/versions/v0002_limits.py",
    "serve/records/store.py",
    "serve/records/table.py",
    "trimaran/gguf_convert.py",
    "deploy/runpod/job_scaler.py",  # imported by a function of handler.py, in queue mode only
}
CATCH_ALL = {"utils", "util", "helpers", "common_utils", "misc", "manager"}


def python_files(folder: str) -> list[Path]:
    path = ROOT / folder
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def imports(path: Path, *, only_top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = {child for node in ast.walk(tree) if is_type_checking(node) for child in ast.walk(node)}
    nodes = tree.body if only_top_level else [node for node in ast.walk(tree) if node not in checked]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def breaks(name: str, forbidden: set[str]) -> bool:
    return any(name == other or name.startswith(other + ".") for other in forbidden)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_stay_within_the_boundary(folder):
    files = python_files(folder)
    assert files, f"{folder} is gone: update the table"
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path)
        if breaks(name, FORBIDDEN[folder]) and not (folder == "serve/errors.py" and name.startswith("serve.errors"))
    }
    assert not found


@pytest.mark.parametrize("folder", ["serve", "trimaran", "deploy/runpod"])
def test_heavy_packages_are_imported_inside_functions_only(folder):
    for path in python_files(folder):
        if str(path.relative_to(ROOT)) not in LAZY_EXEMPT:
            heavy = {name for name in imports(path, only_top_level=True) if breaks(name, LAZY_ONLY)}
            assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} at module level"


def test_only_the_worker_touches_both_a_thread_and_an_event_loop():
    both = {path.name for path in python_files("serve/engine") if {"threading", "asyncio"} <= imports(path)}
    assert both == {"worker.py"}


def test_no_package_file_shadows_an_sdk():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not list((ROOT / "deploy").rglob("__init__.py"))


def test_no_file_has_a_catch_all_name():
    names = {path.stem for folder in ("serve", "trimaran", "deploy", "tests", "bench") for path in python_files(folder)}
    assert not names & CATCH_ALL


def test_files_and_functions_stay_short():
    for folder in ("serve", "trimaran", "deploy", "tests", "bench"):
        for path in python_files(folder):
            text = path.read_text(encoding="utf-8")
            assert text.count("\n") <= 300, f"{path.relative_to(ROOT)} is longer than 300 lines"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or node.lineno) - node.lineno + 1
                    assert length <= 50, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import serve", {"torch", "fastapi", "transformers", "pydantic"}),
        ("import serve; serve.Settings", {"torch", "fastapi", "transformers"}),
        ("import serve; serve.create_app", {"torch", "transformers", "numpy", "huggingface_hub"}),
        ("import serve.engine.runner", {"torch", "transformers", "numpy"}),
        ("import serve.server", {"torch", "transformers", "numpy", "sqlalchemy", "alembic"}),
    ],
)
def test_import_leaves_heavy_packages_alone(code, absent):
    script = f"import sys; {code}; print(*[name for name in {sorted(absent)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
