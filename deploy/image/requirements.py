"""Prints what the image has to install besides the code: ``python requirements.py engine,runpod``.

pip cannot install a project's dependencies without the project, and the code must come in a later layer than they do.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """The project's dependencies and those of ``extras``, where extras may name each other.

    Raises:
        SystemExit: an extra that the project does not have.
    """
    known: dict[str, list[str]] = project["optional-dependencies"]
    found: list[str] = list(project["dependencies"])
    for extra in extras:
        if extra not in known:
            raise SystemExit(f"EXTRAS names {extra!r}; the project has {', '.join(sorted(known))}")
        for requirement in known[extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            found += requirements(project, own[1].split(",")) if own else [requirement]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    wanted = [name for part in sys.argv[1:] for name in part.split(",") if name]
    lines = requirements(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"], wanted)
    sys.stdout.write("\n".join(lines) + "\n")
