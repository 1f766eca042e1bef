"""The image layer: the thin image is built once for all tests; the full one only by ``scripts/image``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import builders
import containers
import pytest

IS_FULL = os.environ.get("TRIMARAN_IMAGE") == "full"
collect_ignore_glob = [] if IS_FULL else ["test_full_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "image":
            item.add_marker(pytest.mark.timeout(1800 if IS_FULL else 400))  # whoever comes first builds


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if containers.MEASURED:
        terminalreporter.section("measured")
        for what, value in containers.MEASURED:
            terminalreporter.write_line(f"{what:<28} {value}")


@pytest.fixture(scope="session")
def tool() -> Iterator[containers.Tool]:
    """What builds and runs images on this machine."""
    with builders.open_tool() as tool:
        yield tool


@pytest.fixture(scope="session")
def thin(tool: containers.Tool) -> containers.Image:
    """The image without torch: echo engine and gateway."""
    return tool.image("thin", {"EXTRAS": "", "REVISION": "0123abc"})
