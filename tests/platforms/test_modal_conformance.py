"""The API's own tests, unchanged, against the app deployed to Modal's real container entry point."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from modal_local import client as client_of
from modal_local import deployed

API = Path(__file__).parents[1] / "api"
MODULES = (
    "test_chat",
    "test_completions",
    "test_messages",
    "test_models",
    "test_response_store",
    "test_responses",
    "test_stream",
    "test_structured_refusals",
    "test_tokenize",
)
OTHER_SERVERS = {"strict", "echo", "seeded"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Takes the place of the API tests' fixture of this name."""
    with deployed() as made, made.container() as container, client_of(container) as http:
        yield http


def only_with_a_client(module: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The tests that need nothing but a client."""
    spec = importlib.util.spec_from_file_location(f"api_{module}", API / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    for name, function in vars(loaded).items():
        needed = set(inspect.signature(function).parameters) if name.startswith("test_") else set[str]()
        if "client" in needed and not needed & OTHER_SERVERS:
            yield name, function


for module in MODULES:
    globals().update(only_with_a_client(module))


def test_this_file_holds_a_good_part_of_the_api_tests():
    assert sum(name.startswith("test_") for name in globals()) > 20
