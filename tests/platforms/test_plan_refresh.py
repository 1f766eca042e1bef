"""`trimaran plan --refresh` asks the real `modal billing rates`, here of the emulator."""

from __future__ import annotations

from datetime import date

from trimaran.emulate.modal.service import Emulator
from trimaran.platforms.prices import refresh


def test_refresh_takes_the_prices_that_modals_own_command_gives(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    today = date(2026, 11, 25)
    with Emulator() as emulator:
        emulator.rates = {"gpu_l4": "0.75", "cpu": "0.05", "memory": "0.01", "volume": "0.09"}
        for name, value in emulator.client_environment().items():
            monkeypatch.setenv(name, value)
        listed, said = refresh(today)
    found = listed.get("modal", "L4")
    assert found is not None, said
    assert (found.usd_per_hour, found.day) == (0.75, today)
    assert "modal: 3 prices of today" in said
