from __future__ import annotations

import ast
import csv
from datetime import date, timedelta
from pathlib import Path

import pytest
from fake_runpod import KEY, serving_runpod_api

from serve.cards import CARDS, MODAL
from serve.errors import ServeError
from trimaran.plan.machines import MODAL_IDLE_S, machines
from trimaran.platforms import prices
from trimaran.platforms.prices import CPU, MEMORY, Price, PriceList, load_prices, refresh
from trimaran.platforms.runpod.api import RunpodApi
from trimaran.platforms.runpod.pools import POOLS

ROOT = Path(__file__).parents[2]
TODAY = date(2026, 11, 25)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_every_price_is_of_a_machine_and_has_a_day_and_a_source():
    known = {(machine.platform, machine.name) for machine in machines()}
    known |= {("modal", CPU), ("modal", MEMORY)}
    rows = list(csv.DictReader((ROOT / "trimaran/platforms/prices.csv").read_text().splitlines()))
    assert {(row["platform"], row["name"]) for row in rows} <= known
    assert all(
        date.fromisoformat(row["date"]) < TODAY and row["source"] and row["per"] in {"hour", "month"} for row in rows
    )
    assert len({(row["platform"], row["name"]) for row in rows}) == len(rows)


def test_every_name_leads_to_a_card():
    assert set(MODAL.values()) <= set(CARDS)
    assert {card for pool in POOLS.values() for card in pool} <= set(CARDS)


def test_idle_seconds_are_those_of_the_deploy():
    tree = ast.parse((ROOT / "deploy/modal/app.py").read_text(encoding="utf-8"))
    assigned = {ast.unparse(node.targets[0]): node for node in tree.body if isinstance(node, ast.Assign)}
    knobs = ast.literal_eval(assigned["KNOBS"].value)
    assert float(knobs["SCALEDOWN_WINDOW"][0]) == MODAL_IDLE_S


def of_day(day: date, usd: float = 1.0) -> Price:
    return Price(platform="modal", name="L4", usd_per_hour=usd, day=day, source="test")


@pytest.mark.parametrize(("age", "warns"), [(0, False), (60, False), (61, True)])
def test_prices_older_than_sixty_days_are_warned_of(age, warns):
    warning = PriceList([of_day(TODAY - timedelta(days=age))]).warning(("modal",), TODAY)
    assert (warning is not None) == warns
    assert warning is None or f"modal {age} days" in warning


def test_newer_price_of_a_machine_counts():
    listed = PriceList([of_day(TODAY, 2.0), of_day(TODAY - timedelta(days=1), 1.0)])
    found = listed.get("modal", "L4")
    assert found is not None
    assert found.usd_per_hour == 2.0


def test_refresh_takes_runpods_prices_of_today_and_keeps_them(monkeypatch):
    monkeypatch.setattr(prices, "_modal", refused)
    with serving_runpod_api() as api:
        monkeypatch.setenv("RUNPOD_API_URL", api.url)
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        listed, said = refresh(TODAY)
    found = listed.get("runpod", "ADA_24")
    assert found is not None
    assert (found.usd_per_hour, found.day) == (1.1, TODAY)
    again = load_prices().get("runpod", "ADA_24")
    assert again == found, "the next start has them too"
    assert any(line.startswith("runpod: 2 prices") for line in said)
    assert any("no credentials here" in line for line in said)
    untouched = listed.get("modal", "L4")
    assert untouched is not None
    assert untouched.usd_per_hour == 0.7992


def refused(_today: date) -> list[Price]:
    raise ServeError("no credentials here")


def test_refresh_without_a_key_says_so(monkeypatch):
    monkeypatch.setattr(prices, "_modal", refused)
    _, said = refresh(TODAY)
    assert any("RUNPOD_API_KEY is not set" in line for line in said)


@pytest.mark.parametrize("gpus", [[{"price": None}], [{}], ["odd"], {"a": 1}, 5])
def test_catalogue_of_another_form_leaves_the_dated_prices(gpus, monkeypatch):
    monkeypatch.setattr(prices, "_modal", refused)
    monkeypatch.setattr(RunpodApi, "gpus", lambda self: gpus)
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    listed, said = refresh(TODAY)
    assert any("another answer than expected" in line for line in said)
    assert listed.get("runpod", "ADA_24") == load_prices().get("runpod", "ADA_24")


def test_refreshed_prices_that_cannot_be_kept_count_once(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(prices, "_modal", lambda today: [of_day(today, 0.5)])
    listed, said = refresh(TODAY)
    found = listed.get("modal", "L4")
    assert found is not None
    assert found.usd_per_hour == 0.5
    assert any("not kept for the next time" in line for line in said)


@pytest.mark.parametrize(
    "text", ["[5]", '["a"]', '{"a": 1}', '[{"day": "2026-11-01", "usd_per_hour": "much"}]', "\xff"]
)
def test_damaged_file_of_refreshed_prices_is_passed_over(text, tmp_path):
    (tmp_path / "trimaran").mkdir()
    (tmp_path / "trimaran" / "prices.json").write_text(text, encoding="latin-1")
    assert load_prices().get("modal", "L4") is not None


@pytest.mark.parametrize("key", ["gpu_a100_80gb", "A100-80GB", "nvidia-a100-80gb"])
def test_modals_rates_are_found_under_any_spelling(key):
    rates = {key: "2.5", "cpu": "0.05", "volume_gib_month": "0.09"}
    found = {price.name: price.usd_per_hour for price in prices._modal_prices(rates, TODAY)}
    assert found == {"A100-80GB": 2.5, CPU: 0.05}


def test_modals_rates_without_a_known_name_are_refused():
    with pytest.raises(ServeError, match="x1"):
        prices._modal_prices({"x1": "1"}, TODAY)
