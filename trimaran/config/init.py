"""``trimaran init``."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING

import click

from serve.errors import ConfigError, HubUnreachable
from trimaran.progress import waiting

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
@click.option("--json", "as_json", is_flag=True, help="Print as JSON what was written.")
def init(model: str, force: bool, no_plan: bool, as_json: bool) -> None:
    """Write a short trimaran.toml for MODEL, a folder or a Hugging Face id.

    The cheapest machine of each platform that holds the model is filled in, as `trimaran plan` finds it.  An existing
    file is kept, with status 2, unless --force is given.
    """
    from serve.setting_file import FILE  # noqa: PLC0415
    from serve.weights import check_name  # noqa: PLC0415

    if FILE.exists() and not force:
        raise ConfigError(
            f"{FILE} is there already; --force replaces it, `trimaran config --origin` shows what it does"
        )
    check_name(model, "MODEL")
    made = None if no_plan else _plan(model)
    text = _text(model, made)
    try:
        FILE.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{FILE.absolute()} cannot be written: {error.strerror}") from None
    except UnicodeEncodeError:
        raise ConfigError("the folder's name is not UTF-8, so no file can name it: rename the folder") from None
    click.echo(f"Wrote {FILE}", err=True)
    click.echo("Next: trimaran run, then trimaran doctor --platform modal|runpod|render", err=True)
    if as_json:
        click.echo(json.dumps({"file": str(FILE.absolute()), **tomllib.loads(text)}, indent=2))


def _plan(model: str) -> Plan | None:
    from trimaran.plan.economics import Load  # noqa: PLC0415
    from trimaran.plan.need import examine  # noqa: PLC0415
    from trimaran.plan.offers import Wishes, make_plan  # noqa: PLC0415
    from trimaran.platforms.prices import load_prices  # noqa: PLC0415

    click.echo(f"Examining {model} ...", err=True)
    try:
        with waiting(f"Examining {model}"):
            need = examine(model, None, None)
    except HubUnreachable as error:  # anything else, such as a folder that cannot be served, is no start
        click.echo(f"{error.message}\nNothing about the model is filled in.", err=True)
        return None
    load = Load(per_hour=60, prompt_tokens=500, output_tokens=300)
    return make_plan(need, Wishes(load=load, concurrency=4, platforms=tuple(OPTIONS)), load_prices())


def _text(model: str, made: Plan | None) -> str:
    size = f"  # {made.need.weight_bytes / 1e9:.3g} GB of weights" if made else ""
    context = made.need.context if made else 8192
    lines = [HEAD, "[model]", f"model = {_quoted(model)}{size}"]
    lines += [f"# max_model_len = {context}  # tokens of prompt and answer together", "", "[serve]"]
    lines += ["# max_batch_size = 8  # requests at once; default: what fits", ""]
    for platform, option in OPTIONS.items():
        lines += [f"[{platform}]", _machine(made, platform, option), ""]
    return "\n".join(lines).rstrip() + "\n"


def _quoted(text: str) -> str:
    """A string of TOML: as JSON has it, but with characters beyond 16 bits as they are."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _machine(made: Plan | None, platform: str, option: str) -> str:
    example = {"modal": '"L4"', "runpod": '["AMPERE_24"]', "render": '"standard"'}[platform]
    if made is None:
        return f"# {option} = {example}"
    priced = [offer for offer in made.fitting if offer.machine.platform == platform and offer.cost]
    best = min(priced, key=lambda offer: offer.remark != "", default=None)  # the first, so the cheapest, without one
    if best is None or best.cost is None:
        return "# no machine of a known price holds this model: trimaran plan --all"
    name = json.dumps([best.machine.name] if platform == "runpod" else best.machine.name)
    return f"{option} = {name}  # about ${best.cost.usd_per_month:.0f} a month at 60 requests an hour: trimaran plan"
