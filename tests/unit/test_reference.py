from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from trimaran.reference import configuration, platform_configuration

ROOT = Path(__file__).parents[2]
PLATFORMS = {"RunPod": ("deploy/runpod/runpod_settings.py", "RunpodSettings", "docs/reference/runpod.md")}
"""Whose knobs are described where: the platform, the file and class, the page."""


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


def test_links_between_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_variables_named_in_the_documents_exist():
    known = set(re.findall(r"`(SERVE_[A-Z_]+)`", configuration() + "".join(map(platform_page, PLATFORMS))))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        named = set(re.findall(r"SERVE_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.relative_to(ROOT)} names {sorted(named - known)}"
