"""``trimaran init``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from serve.errors import ConfigError, ServeError

if TYPE_CHECKING:
    from trimaran.plan.offers import Plan

HEAD = """\
# Trimaran's settings.  Flags win over the environment, that over .env, that over this file.  Every name is shown by
# `trimaran config --all`: SERVE_MAX_QUEUE there is max_queue here.  Secrets stay out of it: export SERVE_API_KEYS.
"""
OPTIONS = {"modal": "gpu", "runpod": "gpu", "render": "plan"}


@click.command(epilog="Example: trimaran init ./my-model && trimaran doctor --platform modal")
@click.argument("model")
@click.option("--force", is_flag=True, help="Replace a trimaran.toml that is there.")
@click.option("--no-plan", is_flag=True, help="Do not look for machines on which the model fits.")
def init(model: str, force: bool, no_plan: bool) -> None:
    """Write a short trimaran.toml for MODEL, a folder or a Hugging Face id.

    The cheapest machine of each platform that holds the model is filled in, as `trimaran plan` finds it.  An existing
    file is kept, with status 2, unless --force is given.
    """
    from serve.setting_file import FILE  # noqa: PLC0415

    if FILE.exists() and not force:
        raise ConfigError(
            f"{FILE} is there already; --force replaces it, `trimaran config --origin` shows what it does"
        )
    made = None if no_plan else _plan(model)
    FILE.write_text(_text(model, made), encoding="utf-8")
    click.echo(f"Wrote {FILE}", err=True)
    click.echo("Next: trimaran run, then trimaran doctor --platform modal|runpod|render", err=True)


def _plan(model: str) -> Plan | None:
    from trimaran.plan.economics import Load  # noqa: PLC0415
    from trimaran.plan.need import examine  # noqa: PLC0415
    from trimaran.plan.offers import Wishes, make_plan  # noqa: PLC0415
    from trimaran.platforms.prices import load_prices  # noqa: PLC0415

    click.echo(f"Examining {model} ...", err=True)
    try:
        need = examine(model, None, None)
    except ServeError as error:
        if Path(model).expanduser().exists():  # a folder that cannot be served is no start
            raise
        click.echo(f"{error.message}\nNothing about the model is filled in.", err=True)
        return None
    load = Load(per_hour=60, prompt_tokens=500, output_tokens=300)
    return make_plan(need, Wishes(load=load, concurrency=4, platforms=tuple(OPTIONS)), load_prices())


def _text(model: str, made: Plan | None) -> str:
    size = f"  # {made.need.weight_bytes / 1e9:.3g} GB of weights" if made else ""
    context = made.need.context if made else 8192
    lines = [HEAD, "[model]", f"model = {json.dumps(model)}{size}"]
    lines += [f"# max_model_len = {context}  # tokens of prompt and answer together", "", "[serve]"]
    lines += ["# max_batch_size = 8  # requests at once; default: what fits", ""]
    for platform, option in OPTIONS.items():
        lines += [f"[{platform}]", _machine(made, platform, option), ""]
    return "\n".join(lines).rstrip() + "\n"


def _machine(made: Plan | None, platform: str, option: str) -> str:
    example = {"modal": '"L4"', "runpod": '["AMPERE_24"]', "render": '"standard"'}[platform]
    if made is None:
        return f"# {option} = {example}"
    priced = [offer for offer in made.fitting if offer.machine.platform == platform and offer.cost]
    best = min(priced, key=lambda offer: offer.remark != "", default=None)  # the first, so the cheapest, without one
    if best is None or best.cost is None:
        return f"# no machine of a known price holds this model: trimaran plan {made.need.model} --all"
    name = json.dumps([best.machine.name] if platform == "runpod" else best.machine.name)
    return f"{option} = {name}  # about ${best.cost.usd_per_month:.0f} a month at 60 requests an hour: trimaran plan"
