"""What scripts/audit makes of what pip-audit and npm answer: JSON as they print it."""

from __future__ import annotations

import importlib.util
import json
import sys
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TODAY = date(2026, 11, 29)
JINJA = {
    "name": "Jinja2",
    "version": "3.1.4",
    "vulns": [
        {
            "id": "PYSEC-2024-9",
            "fix_versions": ["3.1.5"],
            "aliases": ["CVE-2024-56326", "GHSA-q2x7-8rv6-6q7h"],
            "description": "A sandbox breakout.",
        }
    ],
}
CLEAN = {"name": "h11", "version": "0.16.0", "vulns": []}
SKIPPED = {"name": "h11", "skip_reason": "Dependency not found on PyPI and could not be audited: h11 (0.16.0)"}
ALLOWED = """
[[allowed]]
package = "jinja2"
id = "CVE-2024-56326"
reason = "Templates come from the operator."
expires = 2026-11-29
"""
NPM = {
    "auditReportVersion": 2,
    "vulnerabilities": {
        "ai": {"via": ["zod"], "fixAvailable": True},
        "zod": {
            "via": [
                {
                    "source": 1094,
                    "url": "https://github.com/advisories/GHSA-m95q-7qp3-xv42",
                    "range": "<=4.0.0",
                    "severity": "moderate",
                }
            ],
            "fixAvailable": {"name": "zod", "version": "4.0.1", "isSemVerMajor": False},
        },
    },
    "metadata": {"dependencies": {"total": 12}},
}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_audit", ROOT / "scripts" / "audit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def judged(audit: ModuleType, *packages: Any, allowed: str = "", lock: str = "", today: date = TODAY) -> Any:
    found = audit.Audit()
    audit.read_pip_audit(found, lock, json.dumps({"dependencies": packages, "fixes": []}), "")
    status, lines = audit.verdict(found, audit.read_allowed(allowed), today)
    return status, "\n".join(lines)


def test_audit_passes_what_has_no_vulnerability(audit: ModuleType) -> None:
    assert judged(audit, CLEAN, lock="h11==0.16.0\n") == (0, "1 packages audited, 0 not.")


def test_audit_names_package_id_and_fixed_version(audit: ModuleType) -> None:
    status, shown = judged(audit, CLEAN, JINJA)
    assert status == 1
    assert "VULNERABLE: jinja2 3.1.4: PYSEC-2024-9, fixed in 3.1.5" in shown


def test_audit_tells_when_nothing_is_fixed_yet(audit: ModuleType) -> None:
    unfixed = {**JINJA, "vulns": [{**JINJA["vulns"][0], "fix_versions": []}]}
    assert "no fixed version yet" in judged(audit, unfixed)[1]


def test_audit_lets_pass_what_is_allowed_by_any_of_its_names(audit: ModuleType) -> None:
    status, shown = judged(audit, JINJA, allowed=ALLOWED)
    assert status == 0
    assert "allowed until 2026-11-29" in shown
    assert "Templates come from the operator." in shown


def test_audit_allows_nothing_after_the_day(audit: ModuleType) -> None:
    status, shown = judged(audit, JINJA, allowed=ALLOWED, today=date(2026, 11, 30))
    assert status == 1
    assert "it was allowed until 2026-11-29" in shown


def test_audit_allows_a_vulnerability_in_its_own_package_only(audit: ModuleType) -> None:
    assert judged(audit, JINJA, allowed=ALLOWED.replace("jinja2", "h11"))[0] == 1
    assert judged(audit, JINJA, allowed=ALLOWED.replace("56326", "56327"))[0] == 1


def test_audit_says_what_need_not_be_allowed_any_more(audit: ModuleType) -> None:
    status, shown = judged(audit, CLEAN, allowed=ALLOWED)
    assert status == 0
    assert "no longer needed in audit.toml: jinja2 CVE-2024-56326" in shown


def test_audit_takes_skipped_packages_for_not_audited(audit: ModuleType) -> None:
    status, shown = judged(audit, SKIPPED, allowed=ALLOWED)
    assert status == 3
    assert "not audited: h11: Dependency not found on PyPI" in shown
    assert "0 packages audited, 1 not." in shown
    assert "no longer needed" not in shown


def test_audit_misses_no_pin_of_the_lock_file(audit: ModuleType) -> None:
    status, shown = judged(audit, CLEAN, lock="# pins\nh11==0.16.0\nPy_JWT==2.0\n")
    assert status == 3
    assert "not audited: py-jwt: pip-audit does not mention it" in shown


def test_audit_puts_a_vulnerability_before_what_was_not_audited(audit: ModuleType) -> None:
    status, shown = judged(audit, JINJA, SKIPPED)
    assert status == 1
    assert "VULNERABLE" in shown
    assert "not audited" in shown


@pytest.mark.parametrize("text", ["", "Traceback", "{}", "[]"])
def test_audit_takes_a_failed_tool_for_not_audited(audit: ModuleType, text: str) -> None:
    for read in (lambda found, *said: audit.read_pip_audit(found, "", *said), audit.read_npm_audit):
        found = audit.Audit()
        read(found, text, "a\nno network\n\n")
        status, lines = audit.verdict(found, [], TODAY)
        assert status == 3
        assert "no network" in lines[0]


def test_audit_reads_what_npm_answers(audit: ModuleType) -> None:
    found = audit.Audit()
    audit.read_npm_audit(found, json.dumps(NPM), "")
    status, lines = audit.verdict(found, [], TODAY)
    assert status == 1
    assert lines == [
        "VULNERABLE: zod <=4.0.0: GHSA-m95q-7qp3-xv42, fixed with zod 4.0.1",
        "12 packages audited, 0 not.",
    ]


def test_audit_takes_npms_refusal_for_not_audited(audit: ModuleType) -> None:
    found = audit.Audit()
    refusal = {"message": "405 Method Not Allowed", "statusCode": 405, "error": {"summary": "", "detail": ""}}
    audit.read_npm_audit(found, json.dumps(refusal), "npm error audit endpoint returned an error")
    assert audit.verdict(found, [], TODAY)[0] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        ALLOWED.replace("2026-11-29", '"soon"'),
        ALLOWED.replace("Templates come from the operator.", " "),
        ALLOWED.replace("reason", "because"),
        ALLOWED.replace("expires", "# expires"),
        "[[allowed]",
    ],
)
def test_audit_refuses_what_is_allowed_without_reason_or_day(audit: ModuleType, wrong: str) -> None:
    with pytest.raises(ValueError, match=r"give package|Expected"):
        audit.read_allowed(wrong)


def test_audits_own_list_can_be_read(audit: ModuleType) -> None:
    audit.read_allowed(audit.ALLOWED.read_text())


def test_workflows_run_ci_on_pushes_and_the_audit_weekly() -> None:
    folder = ROOT / ".github" / "workflows"
    flows = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yml")}
    commands = {
        name: [step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
        for name, flow in flows.items()
    }
    assert commands == {"audit": ["scripts/audit"], "ci": ["sudo .ci/run"]}
    triggers = {name: flow[True] for name, flow in flows.items()}  # YAML 1.1 reads the key `on` as true
    assert "push" in triggers["ci"]
    assert len(triggers["audit"]["schedule"][0]["cron"].split()) == 5
    for flow in flows.values():
        assert flow["permissions"] == {"contents": "read"}
        used = [step["uses"] for job in flow["jobs"].values() for step in job["steps"] if "uses" in step]
        assert used == ["actions/checkout@v5"]
    assert "audit" not in (ROOT / ".ci" / "run").read_text()
