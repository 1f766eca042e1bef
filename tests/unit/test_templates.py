"""The files under deploy/templates, held against our own settings and the libraries that are here."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from contracts import CONTRACTS, SECRET, TEMPLATES

from serve.settings import Settings, unknown_variables

FILES = sorted(path for path in TEMPLATES.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", CONTRACTS)
def test_template_keeps_its_own_rules(name: str) -> None:
    contract = CONTRACTS[name]()
    assert contract.problems() == []
    assert unknown_variables(contract.environment) == []


@pytest.mark.parametrize("name", CONTRACTS)
def test_template_makes_settings_that_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = CONTRACTS[name]()
    for variable, value in {"SERVE_HOST": "0.0.0.0", **contract.without_model()}.items():  # noqa: S104 - as in the image
        monkeypatch.setenv(variable, value)
    settings = Settings(_env_file=None)  # pyright: ignore[reportCallIssue]
    assert settings.port == (contract.port if "PORT" in contract.environment else 8000)
    assert settings.drain_timeout_s < contract.grace_s
    assert bool(settings.api_keys) is contract.needs_key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_template_says_what_was_verified_and_holds_no_secret(path: Path) -> None:
    text = path.read_text()
    assert "# Verified: " in text
    assert "Not verified: " in text.replace("\n#", "")
    assert not re.search(r"hf_\w{16,}|sk-\w{16,}|rpa_\w{16,}", text)
    assert SECRET not in text


def test_every_template_has_a_contract() -> None:
    assert len(CONTRACTS) == len(FILES) + 2, "Render and RunPod have files of their own"


def test_hugging_face_arguments_are_those_of_its_library() -> None:
    given = yaml.safe_load((TEMPLATES / "huggingface-endpoint.yaml").read_text())
    inspect.signature(huggingface_hub.create_inference_endpoint).bind(**given)
