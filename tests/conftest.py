"""What every test gets: a clean environment, its layer's mark, the asyncio backend and the demo model on demand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
LAYERS = ("unit", "engine", "api", "security", "platforms", "image", "browser", "examples")
FOREIGN = ("SERVE_", "TRIMARAN_", "HF_", "MODAL_", "RUNPOD_")

# As the server sets it: OpenMP threads that spin while they wait starve each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# How long an example takes is the machine's affair: a timing is never a test.
settings.register_profile("trimaran", deadline=None)
settings.load_profile("trimaran")

sys.path.insert(0, str(TESTS))  # for `import support`
# So that their asserts explain themselves, and count with PYTHONOPTIMIZE=1 too.
pytest.register_assert_rewrite(*(path.stem for path in TESTS.glob("*.py") if path.stem != "conftest"))
sys.path.insert(1, str(TESTS.parent / "deploy" / "runpod"))  # as the worker's file sees its siblings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(TESTS) and (layer := item.path.relative_to(TESTS).parts[0]) in LAYERS:
            item.add_marker(layer)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the developer's shell or of the platform must not decide a test."""
    for name in list(os.environ):
        if name == "PORT" or name.startswith(FOREIGN):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, downloaded and converted on first use."""
    from trimaran import demo_model

    return demo_model.prepare()


@pytest.fixture(scope="session")
def demo_embedding() -> Path:
    """The folder of all-MiniLM-L6-v2, downloaded on first use."""
    from trimaran import demo_embedding

    return demo_embedding.prepare()
