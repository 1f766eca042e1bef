"""The compiled kernels for the engine's tests."""

from __future__ import annotations

import pytest
import torch
from support import missing

from serve import kernels
from serve.engine import compiled

UNFIT = not kernels.is_for_this_machine() or bool(kernels.missing_instructions())
collect_ignore = ["test_compiled.py", "test_rows.py", "test_tiles.py"] if UNFIT else []
"""What no package can bring to a machine is not missing there: the engine does without it, too."""


def pytest_report_header() -> str:
    return f"kernels: {'not for this CPU' if UNFIT else 'AVX-512 BF16'}"


@pytest.fixture(scope="session")
def library() -> compiled.Library:
    try:
        kernels.compile_library()
    except kernels.NotCompiled as error:
        missing(str(error))
    found = compiled.library()
    assert found is not None
    return found


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def num_threads(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def _threads(num_threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    yield
    torch.set_num_threads(before)
