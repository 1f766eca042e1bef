"""A server that tests share: most requests leave no trace in it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx2 as httpx
import pytest
import support


@pytest.fixture(scope="session")
def echo() -> Iterator[support.Served]:
    """An echo server without keys."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name == "PORT" or name.startswith("SERVE_")]:
            patch.delenv(name)
        serving = support.serving()
        served = serving.__enter__()
    yield served
    serving.__exit__(None, None, None)


@pytest.fixture(scope="session")
def client(echo: support.Served) -> Iterator[httpx.Client]:
    """A client of that server."""
    with httpx.Client(base_url=echo.url, timeout=30) as client:
        yield client
