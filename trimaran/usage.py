"""``trimaran usage``: what each key used, from the database of usage records."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from serve.errors import ServeError

BAR = 40
"""Characters of the longest bar of the chart."""

MAX_CHARTED = 10
SUMS = ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")
HEADINGS = ("requests", "failed", "prompt", "cached", "completion", "TTFT ms", "machine s", "cost $")
COLUMNS = {"key": "caller", "model": "model", "route": "route", "day": "day"}

Sums = dict[str, Any]
"""One group's: the values that name it, and its sums."""


@click.command(epilog="Example: trimaran usage --url sqlite:////data/usage.db --days 30 --by model")
@click.option("--url", envvar="SERVE_RECORDS_URL", help="The database. Default: SERVE_RECORDS_URL.")
@click.option("--days", type=click.IntRange(1, 3660), default=7, show_default=True, help="Today (UTC) and before it.")
@click.option("--by", type=click.Choice(list(COLUMNS)), default="key", show_default=True, help="One line for each.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each key and day instead.")
def usage(url: str | None, days: int, by: str, as_json: bool) -> None:
    """Print the requests, tokens and estimated cost of each key, and a chart of its days.

    Reads the database that a server with the same SERVE_RECORDS_URL writes.
    """
    if not url:
        raise click.UsageError("name the database: --url sqlite:///usage.db, or set SERVE_RECORDS_URL")
    since = datetime.now(UTC).date() - timedelta(days=days - 1)
    table, chart = read(url, since, [(COLUMNS[by],), ("caller", "day")])
    if as_json:
        for sums in chart:
            click.echo(json.dumps(sums, default=str))
        return
    if not table:
        click.echo(f"No requests since {since} (UTC).")
        return
    click.echo(f"Usage since {since} (UTC)\n")
    click.echo(table_text(COLUMNS[by], table))
    click.echo(f"\nTokens of each key and day\n\n{chart_text(chart, since, days)}")


def read(url: str, since: date, groups: Sequence[tuple[str, ...]]) -> list[list[Sums]]:
    """The sums for each of the groupings.

    Raises:
        ServeError: the address is wrong, or the database does not answer or holds no records.
    """
    from serve.records.address import database_address  # noqa: PLC0415

    address = database_address(url)
    if address.startswith("sqlite") and not Path(file := address.partition(":///")[2]).exists():
        raise ServeError(f"there is no file {file}: has a server with this SERVE_RECORDS_URL run yet?")
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    try:
        return asyncio.run(_read(url, since, groups))
    except (SQLAlchemyError, OSError) as error:
        reason = (str(getattr(error, "orig", None) or error) or type(error).__name__).splitlines()[0]
        raise ServeError(f"the database of usage records cannot be read: {reason}") from None


async def _read(url: str, since: date, groups: Sequence[tuple[str, ...]]) -> list[list[Sums]]:
    from serve.records.store import UsageStore  # noqa: PLC0415

    store = UsageStore(url)
    try:
        found = [await store.sums(since, columns) for columns in groups]
    finally:
        await store.close()
    return [[_plain(row) for row in rows] for rows in found]


def _plain(sums: Mapping[str, Any]) -> Sums:
    """PostgreSQL's sums are decimal numbers."""
    return {**sums, **{name: int(sums[name]) for name in SUMS}}


def table_text(name: str, table: Iterable[Sums]) -> str:
    """One line for each group, and one for all."""
    rows = list(table)
    lines = [(name, *HEADINGS), *((str(sums[name]), *_cells(sums)) for sums in rows), ("total", *_cells(_total(rows)))]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(widths[at]) for at, cell in enumerate(line) if at)]).rstrip()
        for line in lines
    )


def _cells(sums: Sums) -> list[str]:
    ttft, machine, cost = sums["ttft_ms"], sums["machine_ms"], sums["cost_usd"]
    return [
        *(f"{sums[name]:,}" for name in SUMS),
        "" if ttft is None else f"{ttft:.0f}",
        "" if machine is None else f"{machine / 1000:,.1f}",
        "" if cost is None else f"{cost:,.4f}",
    ]


def _total(rows: Sequence[Sums]) -> Sums:
    total: Sums = {name: sum(sums[name] for sums in rows) for name in SUMS}
    for name in ("machine_ms", "cost_usd"):
        known = [sums[name] for sums in rows if sums[name] is not None]
        total[name] = sum(known) if known else None
    return {**total, "ttft_ms": None}


def chart_text(chart: Iterable[Sums], since: date, days: int) -> str:
    """A bar for each key and day, all on one scale; the keys that used most."""
    used: dict[str, dict[date, int]] = {}
    for sums in chart:
        used.setdefault(sums["caller"], {})[sums["day"]] = sums["prompt_tokens"] + sums["completion_tokens"]
    callers = sorted(used, key=lambda caller: -sum(used[caller].values()))
    most = max((tokens for by_day in used.values() for tokens in by_day.values()), default=0)
    lines: list[str] = []
    for caller in callers[:MAX_CHARTED]:
        lines.append(caller)
        for at in range(days):
            day = since + timedelta(days=at)
            tokens = used[caller].get(day, 0)
            if tokens or days <= MAX_CHARTED:
                lines.append(f"  {day:%m-%d} {bar(tokens, most)} {tokens:,}")
    if len(callers) > MAX_CHARTED:
        lines.append(f"and {len(callers) - MAX_CHARTED} more")
    return "\n".join(lines)


def bar(value: int, most: int) -> str:
    """As long as ``value`` is of ``most``, in eighths of a character; whatever there was is seen."""
    eighths = 0 if value <= 0 else max(1, round(value * BAR * 8 / most))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
