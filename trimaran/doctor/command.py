"""``trimaran doctor``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from serve.errors import ConfigError
from trimaran.doctor.finding import Finding, Findings, Situation
from trimaran.progress import waiting

PLATFORMS = ("modal", "runpod", "render")


@click.command(epilog="Example: SERVE_MODAL_GPU=L4 trimaran doctor ./my-model --platform modal")
@click.argument("model", required=False)
@click.option("--platform", type=click.Choice(PLATFORMS), help="Where it shall run.  Default: only the model.")
@click.option("--gpu", "gpus", multiple=True, help="GPU of Modal or pool of RunPod; repeatable.  Default: as deployed.")
@click.option("--plan", help="Instance type of Render.  Default: standard.")
@click.option("--image", help="The image that is deployed (RunPod, Render).")
@click.option("--mode", type=click.Choice(["queue", "http"]), default="queue", show_default=True, help="Of RunPod.")
@click.option("--name", default="trimaran", show_default=True, help="Of the endpoint at RunPod.")
@click.option("--min-cuda", help="Lowest CUDA version of the driver at RunPod.")
@click.option("--disk-gb", type=click.IntRange(1), help="The container's disk at RunPod.")
@click.option("--shutdown-delay", type=click.IntRange(1, 300), default=120, show_default=True, help="Of Render.")
@click.option("--blueprint", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Of Render, checked.")
@click.option("--torch-index", metavar="URL", help="TORCH_INDEX_URL of the image's build.  Default: the Dockerfile's.")
@click.option("--extras", metavar="NAMES", help="EXTRAS of the image's build.  Default: the Dockerfile's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, model: str | None, as_json: bool, **options: Any) -> None:
    """Find what would go wrong with a deployment, before it costs time or money.

    Settings are those that the deploy would use: SERVE_* variables and trimaran.toml.  MODEL overrides SERVE_MODEL.
    Each finding says what, why it hurts, and the command that mends it.  Status 0: nothing found, 1: findings, 2: a
    wrong option.
    """
    try:
        given = _from_file(options["platform"])
    except ConfigError as error:
        found = [_wrong(line) for line in error.message.split("\n")]
    else:
        for name in options:
            if name in given and context.get_parameter_source(name) is ParameterSource.DEFAULT:
                options[name] = given[name]
        with waiting("Looking"):
            found = examine(model, options)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        for finding in found:
            click.echo(f"{finding.name}: {finding.what}\n  why   {finding.why}\n  mend  {finding.mend}\n")
        click.echo(f"{len(found)} findings" if found else "nothing known is wrong", err=True)
    context.exit(1 if found else 0)


def examine(model: str | None, options: dict[str, Any]) -> list[Finding]:
    """All findings, each once.

    Args:
        model: A folder or a Hub id; None: from the settings.
        options: The command's, by the names of :class:`Situation`, with ``shutdown_delay``.
    """
    from serve.settings import EngineName, load_settings  # noqa: PLC0415
    from trimaran.doctor import adapter, hardware, setup, wheels  # noqa: PLC0415
    from trimaran.doctor import model as about_model  # noqa: PLC0415

    try:
        # Loopback: whether keys are needed is the platform's affair, and checked below.
        settings = load_settings(host="127.0.0.1", **({"model": model} if model else {}))
    except ConfigError as error:
        return [_wrong(line) for line in error.message.split("\n")]
    situation = Situation(
        settings=settings,
        environ=_environ(options["platform"]),
        shutdown_delay_s=options["shutdown_delay"],
        **{name: value for name, value in options.items() if name not in {"shutdown_delay", "gpus"}},
    )
    given = (name.strip() for text in options["gpus"] for name in text.split(","))
    situation.gpus = tuple(filter(None, given)) or _modal_gpus(situation)
    is_elsewhere = options["platform"] in {"runpod", "render"} and _is_in_image(settings.model)
    serves = settings.engine is EngineName.TRANSFORMERS and not is_elsewhere
    checks = (*about_model.CHECKS, *hardware.OF_MODELS) if serves else ()
    return list(
        dict.fromkeys(_all((*checks, *hardware.ALWAYS, *wheels.CHECKS, *setup.CHECKS, adapter.knobs), situation))
    )


def _wrong(message: str) -> Finding:
    what, _, mend = message.partition("; ")
    variable = re.match(r"SERVE_\w+", what)
    if near := re.fullmatch(r"did you mean (\S+)\?", mend):
        mend = f"rename it to {near[1]}"
    elif " cannot be read" in what:
        what, mend = message, "correct that file as UTF-8 text; trimaran.toml anew: trimaran init MODEL --force"
    elif what.startswith("trimaran.toml") and not mend:
        mend = "correct that line of trimaran.toml"
    elif variable and not mend:
        mend = f"export {variable[0]}=... as the message says"
    return Finding("wrong-setting", what, "The server would end with status 2, in the cloud too.", mend or message)


def _is_in_image(model: str) -> bool:
    """A path that this machine does not have: of the image, where nothing can be seen from here."""
    return model.startswith("/") and not Path(model).exists()


def _from_file(platform: str | None) -> dict[str, Any]:
    """What the platform's section says, by our options' names.

    Raises:
        ConfigError: the file cannot be read, or a section has a key that is no option.
    """
    from trimaran.config.defaults import defaults  # noqa: PLC0415

    given: dict[str, Any] = dict(defaults()["deploy"].get(platform, {}))
    if "pools" in given:
        given["gpus"] = tuple(given.pop("pools"))
    return given


def _environ(platform: str | None) -> dict[str, str]:
    """The environment, above what the file says to Modal's adapter."""
    from serve.setting_file import as_variables, read_sections  # noqa: PLC0415

    file = as_variables(read_sections().get("modal", {}), "SERVE_MODAL_") if platform == "modal" else {}
    return {**file, **os.environ}


def _modal_gpus(situation: Situation) -> tuple[str, ...]:
    given = situation.environ.get("SERVE_MODAL_GPU", "") if situation.platform == "modal" else ""
    return tuple(name.strip().upper() for name in given.split(",") if name.strip())


def _all(checks: Iterable[Callable[[Situation], Findings]], situation: Situation) -> Findings:
    """What they find.  One that fails, such as over a configuration that no model has, is a finding itself."""
    for check in checks:
        try:
            yield from check(situation)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            yield Finding(
                "check-failed",
                f"the check of {check.__name__.replace('_', ' ')} could not be made ({reason})",
                "Nobody knows whether this part is right; damaged files look like this, and files edited by hand.",
                "look at config.json and the files beside it, or download the model again",
            )
