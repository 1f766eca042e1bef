from __future__ import annotations

import ast
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from serve.api.schemas.chat import ChatCompletionRequest
from serve.api.schemas.completions import CompletionRequest
from serve.api.schemas.embeddings import EmbeddingRequest
from serve.api.schemas.messages import CountTokensRequest, MessagesRequest
from serve.api.schemas.responses import ResponsesRequest
from serve.api.schemas.tokens import DetokenizeRequest, TokenizeRequest
from trimaran.cli import main
from trimaran.cli_reference import cli_reference
from trimaran.http_reference import http_api
from trimaran.reference import configuration, knob_configuration, platform_configuration

ROOT = Path(__file__).parents[2]
PLATFORMS = {"RunPod": ("deploy/runpod/runpod_settings.py", "RunpodSettings", "docs/reference/runpod.md")}
"""Whose knobs are described where: the platform, the file and class, the page."""


MODAL_PAGE = ROOT / "docs/reference/modal.md"


def modal_page() -> str:
    """Made from the table in ``deploy/modal/app.py``, which is read, not run: it would plan a deploy."""
    tree = ast.parse((ROOT / "deploy/modal/app.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KNOBS":
            return knob_configuration("Modal", "SERVE_MODAL_", ast.literal_eval(node.value))
    raise AssertionError("deploy/modal/app.py has no KNOBS")


def platform_page(platform: str) -> str:
    file, name, _ = PLATFORMS[platform]
    return platform_configuration(platform, runpy.run_path(str(ROOT / file))[name])


def test_configuration_page_is_current():
    page = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    assert page == configuration(), "run scripts/reference"


def test_http_page_is_current():
    page = (ROOT / "docs/reference/http-api.md").read_text(encoding="utf-8")
    assert page == http_api(), "run scripts/reference"


BODIES = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


@pytest.mark.parametrize("path", BODIES)
def test_http_page_gives_every_field_of_a_request_its_status(path):
    """As the code decides it: ``check_fields`` refuses NEUTRAL ones, and nothing reads IGNORED ones."""
    body = BODIES[path]
    section = http_page_section(f"POST {path}")
    given = dict(re.findall(r"^\| `([^`]+)` \| .* \| (required|supported|ignored|refused) \|", section, re.MULTILINE))

    assert {name for name in given if not set(name) & set(".[")} == set(body.model_fields)
    for name, field in body.model_fields.items():
        refused, ignored = name in getattr(body, "NEUTRAL", {}), name in getattr(body, "IGNORED", ())
        expected = (
            "refused" if refused else "ignored" if ignored else "required" if field.is_required() else "supported"
        )
        assert given[name] == expected, name
    assert set(getattr(body, "NEUTRAL", {})) | set(getattr(body, "IGNORED", ())) <= set(body.model_fields)


def test_http_page_tells_what_becomes_of_inner_fields():
    chat = http_page_section("POST /v1/chat/completions")
    assert "| `messages[].function_call` | object | refused |" in chat
    assert '| `messages[].content[].type` | `"text"` or `"refusal"` or `"image_url"` or' in chat
    assert "| `stream_options.include_obfuscation` | boolean | ignored |" in chat
    assert "| `messages[].content[].is_error` | boolean | ignored |" in http_page_section("POST /v1/messages")


def http_page_section(heading: str) -> str:
    return http_api().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_platform_page_is_current(platform):
    page = ROOT / PLATFORMS[platform][2]
    assert page.read_text(encoding="utf-8") == platform_page(platform), "run scripts/reference"


def test_page_of_modals_knobs_is_current():
    assert MODAL_PAGE.read_text(encoding="utf-8") == modal_page(), "run scripts/reference"


def test_page_of_the_command_is_current():
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    assert page == cli_reference(main, "trimaran"), "run scripts/reference"


def test_links_between_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def printed_commands() -> list[tuple[str, str]]:
    """Each ``trimaran ...`` in a block of shell of a page: the page and the line, without comments."""
    found: list[tuple[str, str]] = []
    for page in [ROOT / "README.md", *ROOT.glob("docs/guides/*.md")]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\||\$\(|\)", re.sub(r"(^|\s)#.*", "", line)):
                    is_folder = re.match(r"\s*(cd|git)\s", part)
                    if not is_folder and (command := re.search(r"(?:^|[\s/])(trimaran\s.*)", part)):
                        words = command[1].strip()
                        found.append((page.name, words.rstrip('"') if words.count('"') % 2 else words))
    return found


@pytest.mark.parametrize(("page", "line"), printed_commands())
def test_commands_in_the_guides_exist_as_printed(page: str, line: str):
    words = shlex.split(line)[1:]
    command: Any = main
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert command is not main, f"{page}: {line}"
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    if not command.ignore_unknown_options:
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, f"{page}: {line}"
    if isinstance(command, click.Group):
        assert command.invoke_without_command, f"{page}: {line}"


def test_guide_installs_the_torch_that_the_project_wants():
    wanted = re.search(r"torch==([\d.]+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    guide = (ROOT / "docs/guides/first-deployment.md").read_text(encoding="utf-8")
    assert wanted is not None
    assert set(re.findall(r"torch==([\d.]+)", guide)) == {wanted[1]}


def test_variables_named_in_the_documents_exist():
    known = set(
        re.findall(r"`(SERVE_[A-Z_]+)`", configuration() + "".join(map(platform_page, PLATFORMS)) + modal_page())
    )
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        named = set(re.findall(r"SERVE_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.relative_to(ROOT)} names {sorted(named - known)}"
