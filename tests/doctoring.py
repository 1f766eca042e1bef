"""What the tests of `trimaran doctor` share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from trimaran.cli import main

ENVIRONMENT = {
    "modal": {
        "SERVE_API_KEYS": "sk-test",
        "MODAL_TOKEN_ID": "ak-test",
        "MODAL_TOKEN_SECRET": "as-test",
        "SERVE_MODAL_GPU": "L4",
    },
    "runpod": {},
    "render": {"RENDER_API_KEY": "rnd-test"},
    "": {"SERVE_DTYPE": "float32"},
}
"""By platform.  On this machine in a format for which there are no kernels, compiled or missing."""
IMAGE = "docker.io/me/trimaran@sha256:" + "0" * 64
INDEX = "https://download.pytorch.org/whl/"


def save_good(folder: Path, demo_model: Path) -> Path:
    """A small complete model: a tiny Llama with a real tokenizer and chat template."""
    from tiny import tiny_llama

    tiny_llama(folder)
    change(folder, dtype="bfloat16")
    for path in demo_model.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(path, folder / path.name)
    return folder


def change(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def doctor(*arguments: str, platform: str | None = None, **environment: str) -> Result:
    given = {**ENVIRONMENT.get(platform or "", {}), **environment}
    where = ["--platform", platform] if platform else []
    return CliRunner(env=given).invoke(main, ["doctor", *arguments, *where, "--json"])


def found(done: Result) -> list[str]:
    assert done.exit_code in {0, 1}, done.output
    findings = json.loads(done.stdout)
    assert (done.exit_code == 1) == bool(findings)
    assert all(finding[part] for finding in findings for part in ("name", "what", "why", "mend"))
    return [finding["name"] for finding in findings]
