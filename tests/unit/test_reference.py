from __future__ import annotations

import re
from pathlib import Path

from trimaran.reference import configuration

ROOT = Path(__file__).parents[2]


def test_configuration_page_is_current():
    page = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    assert page == configuration(), "run scripts/reference"


def test_links_between_the_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_variables_named_in_the_documents_exist():
    known = set(re.findall(r"`(SERVE_[A-Z_]+)`", configuration()))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        named = set(re.findall(r"SERVE_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.relative_to(ROOT)} names {sorted(named - known)}"
