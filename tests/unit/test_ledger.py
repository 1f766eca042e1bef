"""The ledger: whole lines whoever writes, no secrets, and never in the way of the command that writes it."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import ServeError
from trimaran import ledger
from trimaran.ledger import Entry, append, fingerprint, path, read, recording


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".git").mkdir()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    return tmp_path


def test_ledger_lies_in_the_project_and_git_ignores_it(project):
    append(Entry(platform="render", name="chat"))
    assert path() == project / ".trimaran" / "ledger.jsonl"
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    listed = subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True)
    assert ".trimaran" not in listed.stdout
    (project / ".trimaran" / ".gitignore").unlink()  # to share it
    append(Entry(platform="render", name="chat"))
    listed = subprocess.run(["git", "status", "--porcelain"], cwd=project, capture_output=True, text=True, check=True)
    assert ".trimaran/" in listed.stdout


def test_ledger_without_a_project_lies_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ledger, "MARKS", ("no-such-mark",))
    assert path() == tmp_path / ".trimaran" / "ledger.jsonl"
    monkeypatch.setenv("TRIMARAN_LEDGER", str(tmp_path / "elsewhere.jsonl"))
    assert path() == tmp_path / "elsewhere.jsonl"


def test_numbers_count_each_service(project):
    for platform, name in (("render", "a"), ("render", "b"), ("runpod", "a"), ("render", "a")):
        append(Entry(platform=platform, name=name))
    assert [entry.number for entry in read()[0]] == [1, 1, 1, 2]


def test_broken_lines_are_passed_over_and_never_swallow_the_next(project):
    append(Entry(platform="render", name="a"))
    with path().open("ab") as file:
        file.write(
            b'\xff\xfe not json\n[1, 2]\n{"platform": "render"}\n{"platform": 1, "name": 2}\n\n{"platform": "ren'
        )
    append(Entry(platform="render", name="a", revision="dep-2"))
    with path().open("ab") as file:
        file.write(b'{"platform": "render", "name": "a", "of_a_later_version": 1}\n')
    entries, broken = read()
    assert [(entry.number, entry.revision) for entry in entries] == [(1, None), (2, "dep-2"), (3, None)]
    assert broken == [2, 3, 4, 5, 7]


def test_processes_that_write_at_once_lose_nothing(project):
    script = (
        "import sys; from trimaran.ledger import Entry, append\n"
        "for at in range(50): append(Entry(platform='render', name=sys.argv[1], error='x' * 5000, revision=str(at)))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, name]) for name in ("a", "b")]
    assert [writer.wait(50) for writer in writers] == [0, 0]
    entries, broken = read()
    assert broken == []
    for name in ("a", "b"):
        assert [entry.revision for entry in entries if entry.name == name] == [str(at) for at in range(50)]


def deploy_that_ends_with(raised: BaseException) -> None:
    with recording("runpod", "chat") as entry:
        entry.revision = "3"
        raise raised


def test_recording_notes_what_failed_and_raises_it(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    for raised in (ServeError("the token hf_secret_value is wrong"), KeyboardInterrupt()):
        with pytest.raises(type(raised)):
            deploy_that_ends_with(raised)
    (failed, interrupted), _ = read()
    assert (failed.result, failed.error) == ("failed", "the token *** is wrong")
    assert (interrupted.result, interrupted.error) == ("sent", "KeyboardInterrupt")
    assert failed.seconds is not None
    assert failed.time.endswith("Z")


def test_ledger_that_cannot_be_written_does_not_fail_the_command(project, capsys, monkeypatch):
    (project / "file").write_text("")
    monkeypatch.setenv("TRIMARAN_LEDGER", str(project / "file" / "ledger.jsonl"))
    with recording("render", "chat") as entry:
        entry.result = "live"
    assert "could not be written" in capsys.readouterr().err


def test_ledger_keeps_the_files_mode(project):
    append(Entry(platform="render", name="a"))
    path().chmod(0o600)
    append(Entry(platform="render", name="a"))
    assert stat.S_IMODE(path().stat().st_mode) == 0o600


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_fingerprint_depends_on_values_and_not_on_order(configuration):
    shuffled = dict(reversed(configuration.items()))
    assert fingerprint(configuration) == fingerprint(json.loads(json.dumps(shuffled)))
    assert fingerprint(configuration) != fingerprint({**configuration, "one more thing": 1})


@given(st.sampled_from(["HF_TOKEN", "SERVE_API_KEYS", "DB_PASSWORD"]), st.text(min_size=1), st.text(min_size=1))
def test_fingerprint_does_not_depend_on_secrets(name, one, other):
    assert fingerprint({"env": {name: one}}) == fingerprint({"env": {name: other}})
    assert fingerprint({"env": [{"key": name, "value": one}]}) == fingerprint({"env": [{"key": name, "value": other}]})
    assert fingerprint({"env": {name: one}}) != fingerprint({"env": {}})
