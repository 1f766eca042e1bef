"""``trimaran usage``: what each key used, from the database of usage records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from typing import Any

import click

from serve.errors import ServeError
from serve.records.reading import COUNTS, MAX_DAYS, Sums, first_day, read_sums
from trimaran.progress import waiting

BAR = 40
"""Characters of the longest bar of the chart."""

MAX_CHARTED = 10
TIMEOUT_S = 30.0
MEASURED = ("machine_ms", "cost_usd")
HEADINGS = ("requests", "failed", "prompt", "cached", "completion", "TTFT ms", "machine s", "cost $")
COLUMNS = {"key": "caller", "model": "model", "route": "route", "day": "day"}


@click.command(epilog="Example: trimaran usage --url sqlite:////data/usage.db --days 30 --by model")
@click.option(
    "--url", envvar="SERVE_RECORDS_URL", help="The database, or a server: https://... Default: SERVE_RECORDS_URL."
)
@click.option("--key", envvar="TRIMARAN_API_KEY", help="For a server: a key of the scope admin.")
@click.option(
    "--days", type=click.IntRange(1, MAX_DAYS), default=7, show_default=True, help="Today (UTC) and before it."
)
@click.option("--by", type=click.Choice(list(COLUMNS)), default="key", show_default=True, help="One line for each.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each key and day instead.")
def usage(url: str | None, key: str | None, days: int, by: str, as_json: bool) -> None:
    """Print the requests, tokens and estimated cost of each key, and a chart of its days.

    Reads the database that a server with the same SERVE_RECORDS_URL writes, or asks such a server.
    """
    if not url:
        raise click.UsageError("name the database: --url sqlite:///usage.db, or set SERVE_RECORDS_URL")
    since, groups = first_day(days), [(COLUMNS[by],), ("caller", "day")]
    with waiting("Reading"):
        if url.startswith(("http://", "https://")):
            found = fetch(url, key, days)
            table, chart = (merged(found, columns) for columns in groups)
        else:
            table, chart = read_sums(url, since, groups)
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


def fetch(url: str, key: str | None, days: int) -> list[Sums]:
    """What a server knows.

    Raises:
        ServeError: it does not answer, or not with usage; the message says why.
    """
    import httpx2 as httpx  # noqa: PLC0415

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(url.rstrip("/") + "/usage", params={"days": days}, headers=headers, timeout=TIMEOUT_S)
        body: Any = answer.json()
        if answer.status_code == 200:
            return [{**sums, "day": date.fromisoformat(sums["day"])} for sums in body["usage"]]
        reason = str(body["error"]["message"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ServeError(f"{url} does not answer with usage: {error or type(error).__name__}") from None
    if answer.status_code == 404:
        reason = "usage records are only in its log; start it with SERVE_RECORDS_URL"
    raise ServeError(f"{url} answers {answer.status_code}: {reason}")


def merged(found: Iterable[Sums], columns: Sequence[str]) -> list[Sums]:
    """Sums of sums, by fewer columns."""
    groups: dict[tuple[Any, ...], list[Sums]] = {}
    for sums in found:
        groups.setdefault(tuple(sums[name] for name in columns), []).append(sums)
    return [{**dict(zip(columns, group, strict=True)), **_total(groups[group])} for group in sorted(groups, key=str)]


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
        *(f"{sums[name]:,}" for name in COUNTS),
        "" if ttft is None else f"{ttft:.0f}",
        "" if machine is None else f"{machine / 1000:,.1f}",
        "" if cost is None else f"{cost:,.4f}",
    ]


def _total(rows: Sequence[Sums]) -> Sums:
    total: Sums = {name: sum(sums[name] for sums in rows) for name in COUNTS}
    for name in MEASURED:
        known = [sums[name] for sums in rows if sums[name] is not None]
        total[name] = sum(known) if known else None
    timed = [(sums["ttft_ms"], sums["requests"]) for sums in rows if sums["ttft_ms"] is not None]
    num_timed = sum(number for _, number in timed)
    total["ttft_ms"] = sum(ttft * number for ttft, number in timed) / num_timed if num_timed else None
    return total


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
