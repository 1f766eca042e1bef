"""``trimaran trace``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
from click.core import ParameterSource

from serve.errors import ConfigError
from trimaran.progress import waiting
from trimaran.verify.command import check_address, is_told_to_wait, parse_headers


@click.command(epilog="Example: trimaran trace https://me--my-llm.modal.run --svg trace.svg")
@click.argument("target", metavar="[URL]", required=False)
@click.option("--local", is_flag=True, help="Start a server here, and end it; URL is then its model.")
@click.option("--key", envvar="SERVE_API_KEYS", default="", help="API key. Default: the first of SERVE_API_KEYS.")
@click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="Sent with every request.")
@click.option(
    "--wait", type=click.FloatRange(1, 3600), default=300, show_default=True, help="Seconds for a cold start."
)
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Draw the picture into this file.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def trace(
    target: str | None,
    local: bool,
    key: str,
    headers: tuple[str, ...],
    wait: float,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Show what a cold start spent its seconds on: container, imports, weights, warm-up, first token.

    URL is a server, or RunPod's queue: https://api.runpod.ai/v2/ENDPOINT, with RUNPOD_API_KEY as its key.  A container
    that sleeps is woken, and the wait for it is the first bar.  With --local the model is a folder or a Hub id
    (default: SERVE_MODEL, else the demo model).  One request for one token is made.

    Exit status: 0 done, 1 not ready in time or no token, 2 wrong usage, key or address, 3 the model cannot be loaded.
    """
    from trimaran.trace.observe import local_server, observe, save  # noqa: PLC0415
    from trimaran.trace.picture import picture  # noqa: PLC0415
    from trimaran.trace.queue import queue_of  # noqa: PLC0415
    from trimaran.trace.waterfall import text  # noqa: PLC0415
    from trimaran.verify.target import nobody_there  # noqa: PLC0415

    if local:
        with waiting("Starting a server"), local_server(_model(target)) as (url, own, is_alive):
            made = observe(url, own, wait, is_alive)
    else:
        if not target:
            raise ConfigError("name the server: trimaran trace https://...; or --local [MODEL]")
        check_address(target)
        sent = {**_key(_runpod_key(key) if queue_of(target) else key), **parse_headers(headers)}
        if not is_told_to_wait() and (why := nobody_there(target)):
            raise ConfigError(why)
        with waiting("Waiting until the server is ready"):
            made = observe(target, sent, wait)
    click.echo(json.dumps(made.as_json(), indent=2) if as_json else text(made, is_local=local))
    if svg is not None:
        remark = "woken by the request" if made.container_s is not None else "from its process's birth"
        save(svg, picture(f"{made.model}: cold start to first token", [("Seen", remark, made.phases())]))
        click.echo(f"Wrote {svg}", err=True)


def _model(target: str | None) -> str | None:
    """The model to serve locally; None where the environment's settings decide."""
    if target or os.environ.get("SERVE_MODEL") or os.environ.get("SERVE_ENGINE", "transformers") != "transformers":
        return target
    from trimaran import demo_model  # noqa: PLC0415

    return str(demo_model.prepare())


def _runpod_key(given: str) -> str:
    """RunPod's own, unless one was given by the option."""
    is_given = click.get_current_context().get_parameter_source("key") is ParameterSource.COMMANDLINE
    return given if is_given else os.environ.get("RUNPOD_API_KEY", "")


def _key(keys: str) -> dict[str, str]:
    """The first key, as both headers that our server reads: some platforms keep one for themselves."""
    key = keys.partition(",")[0].strip()
    return {"authorization": f"Bearer {key}", "x-api-key": key} if key else {}
