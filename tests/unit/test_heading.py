from __future__ import annotations

import pytest

from serve.api.heading import fingerprint


def test_fingerprint_reads_the_version_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a file's: reading it took most of a short request's time."""
    first = fingerprint("model")
    monkeypatch.setattr("serve.api.health.version", lambda _: pytest.fail("read again"))
    assert fingerprint("model") == first
    assert fingerprint("other") != first
