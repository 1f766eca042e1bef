"""``trimaran plan``."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve.errors import ConfigError
from trimaran.progress import waiting

if TYPE_CHECKING:
    from trimaran.plan.need import Need
    from trimaran.plan.offers import Wishes
    from trimaran.platforms.prices import PriceList

PLATFORMS = ("modal", "runpod", "render")
PER = {"s": 3600.0, "min": 60.0, "h": 1.0, "d": 1 / 24}
MOST = 10**9
"""Of requests an hour, tokens, seconds and dollars: far beyond what anybody has, and safe to compute with."""

DTYPES = ("auto", "bfloat16", "float16", "float32")


def _requests_per_hour(_context: click.Context, _parameter: click.Parameter, value: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)/(s|min|h|d)", value.strip())
    if not found or float(found[1]) == 0:
        raise click.BadParameter(f"{value!r}: write requests and a time, such as 60/h, 2/s, 10/min or 500/d")
    per_hour = float(found[1]) * PER[found[2]]
    if per_hour > MOST:
        raise click.BadParameter(f"{value!r} is more than {MOST:g} requests an hour, which no plan is for")
    return per_hour


class _Number(click.FloatRange):
    """A number that can be computed with: click takes ``inf`` and ``nan`` too."""

    def __init__(self, *, is_positive: bool = False) -> None:
        super().__init__(0, MOST, min_open=is_positive)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value!r} is not a number", param, ctx)


@click.command(epilog="Example: trimaran plan Qwen/Qwen3-4B --load 60/h --prompt 500 --out 300 --concurrency 8")
@click.argument("model", required=False)
@click.option("--revision", help="Commit, tag or branch at the Hub.")
@click.option("--gguf", "gguf_file", metavar="FILE", help="A GGUF file of the repository or folder, to be planned.")
@click.option("--load", "per_hour", default="60/h", show_default=True, callback=_requests_per_hour, help="Requests.")
@click.option("--prompt", type=click.IntRange(1, MOST), default=500, show_default=True, help="Tokens of a prompt.")
@click.option(
    "--out", "output", type=click.IntRange(1, MOST), default=300, show_default=True, help="Tokens of an answer."
)
@click.option(
    "--context", type=click.IntRange(16, MOST), help="Tokens of a sequence.  Default: the model's, at most 8192."
)
@click.option(
    "--concurrency", type=click.IntRange(1, MOST), default=1, show_default=True, help="Sequences at once, at least."
)
@click.option("--platform", "platforms", multiple=True, type=click.Choice(PLATFORMS), help="Only these; repeatable.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Number format of weights and cache.  Default: SERVE_DTYPE.")
@click.option("--seconds", type=_Number(is_positive=True), help="Of one request.  Default: an estimate.")
@click.option("--cold-start", type=_Number(), help="Seconds of a boot.  Default: an estimate.")
@click.option("--idle", type=_Number(), help="Seconds until it sleeps.  Default: our deploys' own.")
@click.option("--always-on", type=_Number(is_positive=True), help="$/h to compare with.  Default: cheapest.")
@click.option("--refresh", is_flag=True, help="Ask the platforms for today's prices first, and keep them.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw cost over load into this .svg or .png file.")
@click.option("--all", "shows_all", is_flag=True, help="Say of the other machines why they do not fit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(model: str | None, **options: Any) -> None:
    """Where does MODEL fit, what does it cost under a load, and how often does a user wait for a boot?

    MODEL is a folder, a Hugging Face id or a GGUF file; default: SERVE_MODEL, or trimaran.toml.  Weights are not
    downloaded: headers of files are read, and the model runs once without values.  No account is needed.  Status 0
    when it fits somewhere, 1 when nowhere.
    """
    from trimaran.plan import offers, report  # noqa: PLC0415

    wishes = _wishes(options)
    need = _need(model, wishes, options)
    prices, warning = _prices(options["refresh"], wishes.platforms)
    made = offers.make_plan(need, wishes, prices)
    if warning:
        click.echo(f"warning: {warning}", err=True)
    click.echo(json.dumps(report.as_json(made, warning), indent=2) if options["as_json"] else _text(made, options))
    if options["chart"] is not None:
        from trimaran.plan.chart import draw  # noqa: PLC0415

        draw(made, options["chart"])
        click.echo(f"Wrote {options['chart']}", err=True)
    click.get_current_context().exit(0 if made.fitting else 1)


def _need(given: str | None, wishes: Wishes, options: dict[str, Any]) -> Need:
    """What the model needs: ``given``, or with its revision and context the one that the server would take."""
    from trimaran.config.defaults import in_force  # noqa: PLC0415
    from trimaran.plan.need import examine  # noqa: PLC0415

    model = given or in_force("model")
    if not model:
        raise ConfigError("name a model: trimaran plan FOLDER or owner/name (or set SERVE_MODEL, or: trimaran init)")
    revision, context = options["revision"], options["context"]
    if not given:
        revision = revision or in_force("model_revision") or None
        context = context or _whole(in_force("max_model_len"))
    click.echo(f"Examining {model} ...", err=True)
    with waiting(f"Examining {model}"):
        need = examine(model, revision, context, options["gguf_file"], options["dtype"] or in_force("dtype") or "auto")
    tokens = wishes.load.prompt_tokens + wishes.load.output_tokens
    if tokens > need.context:
        raise ConfigError(
            f"a request of {wishes.load.prompt_tokens} + {wishes.load.output_tokens} tokens does not fit into a context"
            f" of {need.context}: lower --prompt or --out, or give --context {tokens} where the model has as much"
        )
    return need


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _text(made: Any, options: dict[str, Any]) -> str:
    from trimaran.plan import report  # noqa: PLC0415

    return report.as_text(made, options["shows_all"])


def _wishes(options: dict[str, Any]) -> Wishes:
    from trimaran.plan.economics import Load  # noqa: PLC0415
    from trimaran.plan.offers import Wishes  # noqa: PLC0415

    return Wishes(
        load=Load(per_hour=options["per_hour"], prompt_tokens=options["prompt"], output_tokens=options["output"]),
        concurrency=options["concurrency"],
        platforms=options["platforms"] or PLATFORMS,
        service_s=options["seconds"],
        cold_s=options["cold_start"],
        idle_s=options["idle"],
        always_on=options["always_on"],
    )


def _prices(is_refreshed: bool, platforms: tuple[str, ...]) -> tuple[PriceList, str | None]:
    from datetime import UTC, datetime  # noqa: PLC0415

    from trimaran.platforms.prices import load_prices, refresh  # noqa: PLC0415

    today = datetime.now(UTC).date()
    if not is_refreshed:
        prices = load_prices()
        return prices, prices.warning(platforms, today)
    click.echo("Asking the platforms for prices ...", err=True)
    with waiting("Asking the platforms for prices"):
        prices, said = refresh(today)
    click.echo("\n".join(said), err=True)
    return prices, prices.warning(platforms, today)
