from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("platform", PLATFORMS)
def test_platform_page_is_current(platform):
    page = ROOT / PLATFORMS[platform][2]
    assert page.read_text(encoding="utf-8") == platform_page(platform), "run scripts/reference"


def test_page_of_modals_knobs_is_current():
    assert MODAL_PAGE.read_text(encoding="utf-8") == modal_page(), "run scripts/reference"


def test_links_between_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_variables_named_in_the_documents_exist():
    known = set(
        re.findall(r"`(SERVE_[A-Z_]+)`", configuration() + "".join(map(platform_page, PLATFORMS)) + modal_page())
    )
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        named = set(re.findall(r"SERVE_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.relative_to(ROOT)} names {sorted(named - known)}"
