"""The compiled kernels for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


@pytest.fixture
def on_threads(library: compiled.Library) -> Callable[[Callable[[], Any]], list[Any]]:
    """What a function gives with one thread, two and three."""
    assert library.parallel, "torch's own OpenMP was found"

    def run(function: Callable[[], Any]) -> list[Any]:
        before, given = torch.get_num_threads(), list[Any]()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                given.append(function())
        finally:
            torch.set_num_threads(before)
        return given

    return run
