"""What platforms ask for their machines, each price with its day; and today's, from their own price APIs."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from serve.cards import MODAL
from serve.errors import ConfigError, ServeError
from serve.folders import default_cache

MAX_AGE_DAYS = 60
HOURS_PER_MONTH = 730
CPU, MEMORY = "cpu-core", "memory-gib"
"""What Modal asks beside the GPU, for each core and each GiB."""

_MODAL_KEYS = {"cpu": CPU, CPU: CPU, "memory": MEMORY, "mem": MEMORY, MEMORY: MEMORY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars an hour for one machine that is up, on ``day``, as ``source`` said."""

    platform: str
    name: str
    usd_per_hour: float
    day: date
    source: str

    def age_days(self, today: date) -> int:
        """How old it is."""
        return (today - self.day).days


class PriceList:
    """Prices by platform and name; of two for the same machine the newer one counts."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self._prices: dict[tuple[str, str], Price] = {}
        for price in prices:
            known = self._prices.get((price.platform, price.name))
            if known is None or known.day <= price.day:
                self._prices[price.platform, price.name] = price

    def get(self, platform: str, name: str) -> Price | None:
        """The price of one machine; None: it was never seen."""
        return self._prices.get((platform, name))

    def warning(self, platforms: Iterable[str], today: date) -> str | None:
        """What to say when prices are older than 60 days."""
        old = {
            platform: max(price.age_days(today) for (owner, _), price in self._prices.items() if owner == platform)
            for platform in platforms
        }
        stale = [f"{platform} {days} days" for platform, days in sorted(old.items()) if days > MAX_AGE_DAYS]
        if not stale:
            return None
        return f"prices are older than {MAX_AGE_DAYS} days ({', '.join(stale)}); ask the platforms: --refresh"


def load_prices() -> PriceList:
    """Those that came with this version, and those that were refreshed on this machine."""
    return PriceList([*_shipped(), *_refreshed()])


def refresh(today: date) -> tuple[PriceList, list[str]]:
    """Ask the platforms that this machine has credentials for, and keep the answers.

    Returns:
        All prices, and one line for each platform: what was asked, or why not.
    """
    found: list[Price] = []
    said: list[str] = []
    for platform, ask in (("modal", _modal), ("runpod", _runpod)):
        try:
            prices = ask(today)
        except ServeError as error:
            said.append(f"{platform}: kept the dated prices; {error.message}")
        else:
            found += prices
            said.append(f"{platform}: {len(prices)} prices of today")
    said.append("render: kept the dated prices; Render has no price API")
    kept = {(price.platform, price.name): price for price in (*_refreshed(), *found)}
    rows = [{**asdict(price), "day": price.day.isoformat()} for price in kept.values()]
    try:
        path = _refreshed_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    except (OSError, RuntimeError) as error:  # no place to write to, or no home
        said.append(f"the prices are not kept for the next time: {error}")
    return PriceList([*_shipped(), *kept.values()]), said


def _shipped() -> list[Price]:
    text = (files("trimaran.platforms") / "prices.csv").read_text(encoding="utf-8")
    return [
        Price(
            platform=row["platform"],
            name=row["name"],
            usd_per_hour=float(row["usd"]) / (HOURS_PER_MONTH if row["per"] == "month" else 1),
            day=date.fromisoformat(row["date"]),
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    ]


def _refreshed_file() -> Path:
    return default_cache() / "prices.json"


def _refreshed() -> list[Price]:
    try:
        rows: list[dict[str, Any]] = json.loads(_refreshed_file().read_text(encoding="utf-8"))
        days = [date.fromisoformat(row.pop("day")) for row in rows]
        usd = [float(row.pop("usd_per_hour")) for row in rows]
        return [Price(day=day, usd_per_hour=one, **row) for day, one, row in zip(days, usd, rows, strict=True)]
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
    ):  # none yet, or of another version
        return []


def _modal(today: date) -> list[Price]:
    """By Modal's own command, which knows the account."""
    command = [sys.executable, "-m", "modal", "billing", "rates", "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise ServeError("`modal billing rates` did not answer within 60 s") from None
    if done.returncode:
        lines = [line.strip(" │╭╮╰╯─") for line in (done.stderr or done.stdout).splitlines()]
        why = next((line for line in reversed(lines) if line), "no message")
        raise ServeError(f"`modal billing rates` failed ({why}); try: modal setup")
    try:
        rates: dict[str, str] = json.loads(done.stdout)
        return _modal_prices(rates, today)
    except (ValueError, AttributeError, TypeError):
        raise ServeError("`modal billing rates --json` gave another answer than expected") from None


def _modal_prices(rates: Mapping[str, str], today: date) -> list[Price]:
    """Dollars per unit and hour, by names such as ``gpu_a100_80gb`` or ``A100-80GB``."""
    names = {_plain(name): name for name in MODAL} | {_plain(key): name for key, name in _MODAL_KEYS.items()}
    prices: list[Price] = []
    for key, value in rates.items():
        name = names.get(_plain(key))
        if name is not None:
            source = "modal billing rates"
            prices.append(Price(platform="modal", name=name, usd_per_hour=float(value), day=today, source=source))
    if not prices:
        raise ServeError(f"`modal billing rates --json` names no GPU that is known here: {', '.join(rates) or 'none'}")
    return prices


def _plain(name: str) -> str:
    """Letters and digits, ``!`` and ``+``, without what stands before a GPU's name."""
    return re.sub(r"[^a-z0-9!+]", "", re.sub(r"^(gpu|nvidia)[ _.-]*", "", name.lower()))


def _runpod(today: date) -> list[Price]:
    """By the catalogue of REST v2: a pool's price is on each of its cards."""
    from trimaran.platforms.runpod.api import API, RunpodApi  # noqa: PLC0415

    key = os.environ.get("RUNPOD_API_KEY")
    if not key:
        raise ConfigError("RUNPOD_API_KEY is not set")
    api = RunpodApi(key, os.environ.get("RUNPOD_API_URL", API))
    try:
        by_pool: dict[str, float] = {}
        for gpu in api.gpus():
            price: Any = gpu["price"].get("serverless")
            if gpu.get("pool") and isinstance(price, int | float):
                by_pool[gpu["pool"]] = max(float(price), by_pool.get(gpu["pool"], 0.0))
    except (LookupError, TypeError, AttributeError):
        raise ServeError("RunPod's catalogue gave another answer than expected") from None
    finally:
        api.close()
    source = "RunPod's catalogue, GET /v2/catalog/gpus"
    return [
        Price(platform="runpod", name=pool, usd_per_hour=price, day=today, source=source)
        for pool, price in by_pool.items()
    ]
