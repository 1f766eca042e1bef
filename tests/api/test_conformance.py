"""The public conformance suites of llm-comply: what passes stays passed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llm_comply
import pytest
import support
from llm_comply.config import ComplianceConfig
from llm_comply.http import close_client
from llm_comply.runner import TestRunner as Runner
from llm_comply.schema import SpecLoader
from llm_comply.tests.anthropic import ANTHROPIC_TESTS
from llm_comply.tests.open_responses import OPEN_RESPONSES_TESTS
from llm_comply.tests.openai_chat import OPENAI_CHAT_TESTS

# Some tests are for models of certain names only.
MODEL = "claude-3-5-deepseek-r1"

# A text model shall describe an image: by default, that is refused by name.
IMAGE_CHECKS = {"chat-image-input", "image-input", "anth-image-input"}

TEMPLATE = (
    "{% if enable_thinking is defined and enable_thinking %}<think>Well.</think>{% endif %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{{ messages[-1].content }}"
)
"""The echo model answers with it: it thinks when asked to, and a grammar makes its calls."""

SUITES: dict[str, tuple[list[Any], str]] = {
    "chat": (OPENAI_CHAT_TESTS, "openai_chat.json"),
    "responses": (OPEN_RESPONSES_TESTS, "openresponses.json"),
    "messages": (ANTHROPIC_TESTS, "anthropic.json"),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "all.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def server(template: Path) -> Iterator[support.Served]:
    with support.serving(model_name=MODEL, chat_template=template, api_keys="sk-right", image_input="note") as served:
        yield served


def failures(suite: str, url: str) -> dict[str, Any]:
    """What fails of a suite, with the reasons; a check that is skipped or warns fails too."""
    cases, spec = SUITES[suite]
    config = ComplianceConfig(base_url=url + "/v1", api_key="sk-right", model=MODEL)
    specs = SpecLoader(str(Path(llm_comply.__file__).with_name("specs") / spec))

    runner = Runner(config, cases, specs)
    results: list[Any] = []
    for case in cases:
        results.append(runner.run_one(case))
        # Its client leaves a stream at [DONE], and takes the connection again before it has seen the end.
        close_client()

    assert len(results) == {"chat": 9, "responses": 13, "messages": 9}[suite]
    failed = {result.id: result.errors for result in results if result.status.name != "PASSED"}
    # The suite only warns where there is no route to compact a conversation, which there is not.
    warned = {result.id: result.warnings for result in results if result.warnings and result.id != "compact-response"}
    return failed | warned


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver is deprecated:DeprecationWarning")
@pytest.mark.parametrize("suite", SUITES)
def test_conformance_is_complete_where_images_become_notes(server: support.Served, suite: str) -> None:
    assert failures(suite, server.url) == {}


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver is deprecated:DeprecationWarning")
def test_conformance_is_complete_but_for_images_by_default(template: Path) -> None:
    with support.serving(model_name=MODEL, api_keys="sk-right", chat_template=template) as served:
        failed = {check for suite in SUITES for check in failures(suite, served.url)}
    assert failed == IMAGE_CHECKS
