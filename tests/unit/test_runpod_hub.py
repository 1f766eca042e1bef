"""The files of RunPod's Hub are current, well-formed, and name what the settings have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.settings import PREFIX, Settings, load_settings
from trimaran.platforms.runpod import hub

ROOT = Path(__file__).parents[2]
ENTRIES: list[dict[str, Any]] = hub.hub()["config"]["env"]


@pytest.mark.parametrize("path", hub.files(ROOT))
def test_hub_file_is_current(path: str):
    assert (ROOT / path).read_text(encoding="utf-8") == hub.files(ROOT)[path], "run scripts/reference"


def test_every_setting_is_listed_or_left_out_on_purpose():
    listed = {entry["key"] for entry in ENTRIES if entry["key"].startswith(PREFIX)} - {"SERVE_RUNPOD_MODE"}
    assert listed == {PREFIX + name.upper() for name in Settings.model_fields.keys() - hub.LEFT_OUT}
    assert Settings.model_fields.keys() >= hub.LEFT_OUT


def test_inputs_have_the_hubs_types_and_words():
    for entry in ENTRIES:
        given = entry.get("input")
        if given is None:
            assert entry.keys() == {"key", "value"}
            continue
        assert given["type"] in {"string", "number", "boolean", "huggingface"}
        assert given["name"]
        assert given["description"]
        if "default" in given:
            kinds = {"number": (int, float), "boolean": bool, "string": str, "huggingface": str}
            assert isinstance(given["default"], kinds[given["type"]])


def test_the_defaults_are_what_the_server_would_take_anyway(monkeypatch: pytest.MonkeyPatch):
    plain = load_settings(model="owner/name")
    for entry in ENTRIES:
        if "default" in entry.get("input", {}):
            monkeypatch.setenv(entry["key"], str(entry["input"]["default"]))
    assert load_settings(model="owner/name") == plain


def test_the_last_stage_of_the_hubs_dockerfile_is_runpods():
    text = hub.files(ROOT)[".runpod/Dockerfile"]
    stages = [line.rpartition(" AS ")[2] for line in text.splitlines() if line.startswith("FROM ")]
    assert stages[-1] == "runpod"
    assert 'ENTRYPOINT ["python", "-u", "deploy/runpod/handler.py"]' in text
    with pytest.raises(ValueError, match="no stage runpod"):
        hub.dockerfile("FROM x AS serve\n")
