"""Writes the bill of materials of an image in CycloneDX 1.6: python scripts/sbom.py IMAGE > FILE.

Everything is read inside the image: Python distributions, Debian packages, a baked model; with versions and licences.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

VERSION = SchemaVersion.V1_6

INVENTORY = """
import importlib.metadata, json, os, pathlib, platform
def fields(block):
    return dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(" "))
status = pathlib.Path("/var/lib/dpkg/status")
blocks = status.read_text(errors="replace").split("\\n\\n") if status.exists() else []
packages = [found for found in map(fields, blocks) if found.get("Status", "").endswith(" installed")]
release = pathlib.Path("/etc/os-release").read_text()
print(json.dumps({
    "python": platform.python_version(),
    "system": dict(line.replace('"', "").split("=", 1) for line in release.splitlines() if "=" in line),
    "distributions": [
        [d.metadata["Name"], d.version, d.metadata.get("License-Expression") or ""]
        for d in importlib.metadata.distributions() if d.metadata["Name"]
    ],
    "debian": [[p["Package"], p["Version"], p["Architecture"]] for p in packages],
    "model": [os.environ.get("SERVE_MODEL", ""), os.environ.get("SERVE_MODEL_REVISION", "")],
}))
"""
"""Run by the image's own Python."""


def inventory(image: str, runner: str, options: str) -> dict[str, Any]:
    """What is in the image."""
    start = [*shlex.split(runner), "run", "--rm", "--network", "none", *shlex.split(options), "--entrypoint", "python"]
    done = subprocess.run([*start, image, "-c", INVENTORY], stdout=subprocess.PIPE, check=True, text=True, timeout=120)
    return json.loads(done.stdout)


def bill(image: str, found: dict[str, Any]) -> Bom:
    """The bill: the image itself, and what it holds."""
    bom = Bom()
    versions = {name.lower(): version for name, version, _ in found["distributions"]}
    root = Component(type=ComponentType.CONTAINER, name=image, version=versions.get("trimaran"), bom_ref="image")
    bom.metadata.component = root
    components = {str(component.bom_ref.value): component for component in _components(found)}
    for component in components.values():
        bom.components.add(component)
    bom.register_dependency(root, components.values())
    return bom


def _components(found: dict[str, Any]) -> Iterator[Component]:
    system = found["system"]
    yield Component(
        type=ComponentType.OPERATING_SYSTEM, name=system["ID"], version=system.get("VERSION_ID"), bom_ref=system["ID"]
    )
    yield Component(type=ComponentType.PLATFORM, name="python", version=found["python"], bom_ref="python")
    for name, version, licence in found["distributions"]:
        url = PackageURL("pypi", None, name.lower().replace("_", "-"), version)
        licences = [LicenseFactory().make_from_string(licence)] if licence else []
        yield _library(name, version, url, licences)
    for name, version, architecture in found["debian"]:
        yield _library(name, version, PackageURL("deb", system["ID"], name, version, {"arch": architecture}), [])
    model, revision = found["model"]
    if model and "/" in model:
        owner, name = model.split("/", 1)
        url = PackageURL("huggingface", owner, name, revision or None)
        kind = ComponentType.MACHINE_LEARNING_MODEL
        yield Component(type=kind, name=model, version=revision or None, purl=url, bom_ref=str(url))


def _library(name: str, version: str, url: PackageURL, licences: list[Any]) -> Component:
    kind = ComponentType.LIBRARY
    return Component(type=kind, name=name, version=version, purl=url, licenses=licences, bom_ref=str(url))


def main() -> int:
    """Print the bill; 1 when CycloneDX's own schema refuses it."""
    parser = argparse.ArgumentParser(description="Write an image's bill of materials in CycloneDX 1.6.")
    parser.add_argument("image")
    parser.add_argument("--runner", default="docker", help="the command that runs images (default: docker)")
    parser.add_argument("--options", default="", help="options for its run")
    given = parser.parse_args()
    bom = bill(given.image, inventory(given.image, given.runner, given.options))
    text = make_outputter(bom, OutputFormat.JSON, VERSION).output_as_string(indent=2)
    problem = JsonStrictValidator(VERSION).validate_str(text)
    if problem is not None:
        sys.stderr.write(f"the bill is not valid: {problem}\n")
        return 1
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
