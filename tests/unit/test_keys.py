"""Keys without a server: what a file may hold, whose a key is, and the command that makes them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import AuthenticationError, ConfigError
from serve.keys import MAX_KEYS, ApiKey, KeyRing, Scope, digest_of, environment_key, read_keys, write_keys
from trimaran.cli import main

HEX = hashlib.sha256(b"secret").hexdigest()


def keys(*arguments: object, file: Path | None = None) -> Result:
    environment = {"SERVE_API_KEYS_FILE": str(file)} if file else {}
    return CliRunner().invoke(main, ["keys", *map(str, arguments)], env=environment)


@given(
    st.lists(
        st.builds(
            ApiKey,
            digest=st.binary(min_size=32, max_size=32),
            name=st.from_regex(r"[A-Za-z0-9]{1,3}[._@-]?[a-z]{0,3}", fullmatch=True).filter(
                lambda name: name[:4] != "key-"
            ),
            scopes=st.frozensets(st.sampled_from(Scope)),
            expires_at=st.none() | st.datetimes(timezones=st.just(UTC), min_value=datetime(1971, 1, 1)),
        ),
        max_size=4,
    )
)
def test_keys_come_out_of_a_file_as_they_went_in(tmp_path_factory, found):
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    write_keys(file, found)
    assert read_keys(file) == found
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read as JSON"),
        ("[]", 'does not hold {"keys"'),
        ({"keys": [{}]}, r"keys\[0\] needs sha256"),
        ({"keys": [{"sha256": HEX}, {"sha256": HEX[1:]}]}, r"keys\[1\].sha256: a SHA-256 has 64"),
        ({"keys": [{"sha256": 5}]}, "64 hexadecimal digits"),
        ({"keys": [{"sha256": HEX, "scopes": ["root"]}]}, "'root' is not a valid Scope"),
        ({"keys": [{"sha256": HEX, "expires_at": "soon"}]}, "soon"),
        ({"keys": [{"sha256": HEX, "key": "secret"}]}, "unknown field 'key'"),
        ({"keys": [{"sha256": HEX, "name": "key-1"}]}, "is no name for a key"),
        ({"keys": [{"sha256": HEX, "name": "anonymous"}]}, "is no name for a key"),
        ({"keys": [{"sha256": HEX, "name": "a b"}]}, "is no name for a key"),
        ({"keys": [{"sha256": HEX}] * (MAX_KEYS + 1)}, f"at most {MAX_KEYS}"),
    ],
)
def test_file_that_is_wrong_says_where(tmp_path: Path, content: Any, words: str):
    file = tmp_path / "keys.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=words):
        read_keys(file)


def test_file_that_is_missing_says_what_makes_one(tmp_path: Path):
    with pytest.raises(ConfigError, match="trimaran keys new --file"):
        KeyRing(path=tmp_path / "keys.json")


def test_keys_of_the_environment_are_plain_or_hashed():
    ring = KeyRing([environment_key("plain"), environment_key("sha256:" + HEX)])
    assert ring.identify(b"plain").scopes == set(Scope)
    assert ring.identify(b"secret").caller == f"key-{HEX[:8]}"
    for wrong in (b"sha256:" + HEX.encode(), HEX.encode(), b"", b"plain "):
        with pytest.raises(AuthenticationError):
            ring.identify(wrong)
    with pytest.raises(ConfigError, match="SERVE_API_KEYS: a SHA-256 has 64"):
        environment_key("sha256:" + HEX[1:])


def test_key_counts_until_it_expires():
    end = datetime(2030, 1, 1, tzinfo=UTC)
    now = end.timestamp() - 1
    ring = KeyRing([ApiKey(digest=digest_of(b"k"), name="ci", expires_at=end)], clock=lambda: now)
    assert ring.identify(b"k").caller == "ci"
    now += 1
    with pytest.raises(AuthenticationError, match="has expired"):
        ring.identify(b"k")


def test_ring_takes_a_changed_file_and_keeps_the_last_good_one(tmp_path: Path):
    file, link = tmp_path / "keys.json", tmp_path / "link.json"
    write_keys(file, [ApiKey(digest=digest_of(b"one"))])
    link.symlink_to(file)
    ring = KeyRing(path=link)
    assert not ring.is_empty
    write_keys(file, [ApiKey(digest=digest_of(b"two"))])
    ring.refresh()
    assert ring.identify(b"two")
    with pytest.raises(AuthenticationError):
        ring.identify(b"one")
    for break_it in (lambda: file.write_text("{"), file.unlink):
        break_it()
        ring.refresh()
        assert ring.identify(b"two")
    write_keys(file, [])
    ring.refresh()
    assert not ring.is_empty  # a file without keys lets nobody in
    with pytest.raises(AuthenticationError):
        ring.identify(b"two")


def test_ring_reads_again_what_could_not_be_read_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Permissions, or no more open files: the file itself does not change when that is over."""
    file = tmp_path / "keys.json"
    write_keys(file, [ApiKey(digest=digest_of(b"one"))])
    ring = KeyRing(path=file)
    write_keys(file, [ApiKey(digest=digest_of(b"two"))])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
        ring.refresh()
        ring.refresh()
    assert ring.identify(b"one")
    assert len(caplog.records) == 1
    ring.refresh()
    assert ring.identify(b"two")


def test_ring_survives_a_file_that_nests_without_end(tmp_path: Path):
    file = tmp_path / "keys.json"
    write_keys(file, [ApiKey(digest=digest_of(b"one"))])
    ring = KeyRing(path=file)
    file.write_text('{"keys": ' + "[" * 100_000)
    ring.refresh()
    assert ring.identify(b"one")


def test_file_of_keys_keeps_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else root, who makes a key, would lock the server's user out."""
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "chown", lambda _, uid, gid: given.append((uid, gid)))
    file = tmp_path / "keys.json"
    write_keys(file, [])
    assert given == []
    write_keys(file, [])
    assert given == [(file.stat().st_uid, file.stat().st_gid)]


def test_command_makes_lists_and_revokes_keys(tmp_path: Path):
    file = tmp_path / "keys.json"
    made = [
        keys("new", "--name", "ci", "--expires", "90d", file=file),
        keys("new", "--name", "ci", file=file),
        keys("new", "--scope", "admin", "--scope", "inference", "--expires", "2001-01-01", file=file),
    ]
    secrets = [one.stdout.strip() for one in made]
    assert [one.exit_code for one in made] == [0, 0, 0]
    assert len(set(secrets)) == 3
    assert all(len(secret) == 68 and secret not in file.read_text() for secret in secrets)

    ring = KeyRing(path=file)
    assert [ring.identify(secret.encode()).caller for secret in secrets[:2]] == ["ci", "ci"]
    found = read_keys(file)
    assert found[0].scopes == {Scope.INFERENCE}
    assert found[2].scopes == {Scope.INFERENCE, Scope.ADMIN}
    assert timedelta(days=89) < found[0].expires_at - datetime.now(UTC) <= timedelta(days=90)  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]

    listed = keys("list", file=file).output.splitlines()
    assert listed[1].split()[:3] == [found[0].id, "ci", "inference"]
    assert listed[2].endswith("never")
    assert "2001-01-01 00:00 (over)" in listed[3]

    assert keys("revoke", found[0].id, file=file).exit_code == 0
    assert [key.id for key in read_keys(file)] == [found[1].id, found[2].id]
    again = keys("revoke", found[0].id, file=file)
    assert (again.exit_code, "there is no key" in again.output) == (1, True)


def test_command_without_a_file_makes_a_key_for_the_environment():
    made = keys("new")
    hashed = next(word for word in made.stderr.split() if word.startswith("sha256:"))
    assert KeyRing([environment_key(hashed)]).identify(made.stdout.strip().encode())
    assert keys("new", "--name", "ci").exit_code == 2
    assert keys("list").exit_code == 2
    assert keys("new", "--name", "key-ci", "--file", "x").exit_code == 2
    assert keys("new", "--expires", "soon", "--file", "x").exit_code == 2
    assert not Path("x").exists()


def test_command_says_why_a_file_cannot_be_written(tmp_path: Path):
    done = keys("new", file=tmp_path / "none" / "keys.json")
    assert (done.exit_code, "cannot be written" in done.output) == (2, True)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
