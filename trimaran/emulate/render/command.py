"""``trimaran emulate render``."""

from __future__ import annotations

import io
import json
import socket
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import click

from serve.errors import ConfigError

BLUEPRINT = "render.yaml"


@click.command(epilog="Example: trimaran emulate render deploy/render/render.yaml --env SERVE_ENGINE=echo")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--service", help="Its name in the Blueprint.  Default: the first web service.")
@click.option("--plan", help="Another instance type than the Blueprint's.")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=10000, show_default=True, help="PORT; Render's is 10000."
)
@click.option(
    "--env", "variables", multiple=True, metavar="NAME=VALUE", help="In place of the Blueprint's; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Print the rules as JSON.")
@click.pass_context
def render(
    context: click.Context,
    file: Path | None,
    service: str | None,
    plan: str | None,
    port: int,
    variables: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run a Blueprint's service here under Render's rules, and report each as kept or broken.

    FILE is the Blueprint.  Default: render.yaml; where there is none, what `trimaran deploy render` would create from
    trimaran.toml and SERVE_MODEL, whose model may be a folder here.

    The real server gets PORT, only the Blueprint's variables, an empty file system and the plan's memory; it is checked
    as Render checks it, ends by SIGTERM in the middle of a stream, and starts anew.  Status 1 when a rule is broken.
    Not emulated: the build, the network, and the plan's share of the CPU beyond the number of threads.
    """
    from trimaran.emulate.render.rules import Verdict, judged  # noqa: PLC0415
    from trimaran.emulate.render.scene import read_scene  # noqa: PLC0415
    from trimaran.emulate.render.session import Session  # noqa: PLC0415
    from trimaran.platforms.render.check import check_blueprint  # noqa: PLC0415

    changes = dict(_pair(variable) for variable in variables)
    text, where, own = _blueprint(file)
    scene = read_scene(text, name=service, plan=plan, port=port, changes=own | changes)
    _check_free(port)
    findings = [judged("Blueprint", False, str(problem)) for problem in check_blueprint(text, Path())]
    found = findings or [judged("Blueprint", True, f"{where}: nothing known is wrong")]
    for finding in found:
        click.echo(str(finding), err=as_json)
    with tempfile.TemporaryDirectory(prefix="trimaran-render-") as folder:
        for finding in Session(scene, Path(folder), lambda line: click.echo(f"  {line} ...", err=True)).run():
            found.append(finding)
            click.echo(str(finding), err=as_json)
    if as_json:
        click.echo(json.dumps([{**asdict(finding), "verdict": finding.verdict.value} for finding in found], indent=2))
    num_broken = sum(finding.verdict is Verdict.BROKEN for finding in found)
    click.echo(f"{num_broken} of {len(found)} rules broken" if num_broken else f"{len(found)} rules kept", err=True)
    context.exit(1 if num_broken else 0)


def _blueprint(file: Path | None) -> tuple[str, str, dict[str, str]]:
    """The Blueprint, what it is called, and variables in place of its own.

    Raises:
        ConfigError: it cannot be read; or without one, nothing says what to serve.
    """
    if file is None and Path(BLUEPRINT).is_file():
        file = Path(BLUEPRINT)
    if file is None:
        return of_settings()
    try:
        return file.read_text(encoding="utf-8"), str(file), {}
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{file} cannot be read: {why}") from None


def of_settings() -> tuple[str, str, dict[str, str]]:
    """What the deploy would write, what to call it, and a model that is a folder here in place of one at the Hub.

    Raises:
        ConfigError: nothing says what to serve, or the file is wrong.
    """
    from trimaran.config.defaults import engine_in_force, model_in_force, platform_options  # noqa: PLC0415
    from trimaran.deploy.render import render as deploy  # noqa: PLC0415
    from trimaran.plan.need import weight_bytes  # noqa: PLC0415
    from trimaran.platforms.render.plans import smallest_plan  # noqa: PLC0415

    model, given = model_in_force(), platform_options("render", deploy)
    if not model and engine_in_force() in {"", "transformers"}:
        raise ConfigError(
            f"there is no {BLUEPRINT}, and no model is named: trimaran init MODEL, or: trimaran emulate render FILE"
        )
    arguments, changes = list[str](), dict[str, str]()
    folder = Path(model).expanduser()
    if model and folder.exists():
        arguments += ["--model", "local/folder"]
        if "plan" not in given:
            arguments += ["--plan", smallest_plan(weight_bytes(model, None)).name]
        changes["SERVE_MODEL"] = str(folder.absolute())
    if not (given.get("image") or given.get("repo") or Path("Dockerfile").exists()):
        arguments += ["--image", "docker.io/none/needed:here"]  # nothing is built
    printed = io.StringIO()
    with (
        redirect_stdout(printed),
        deploy.make_context("render", [*arguments, "--dry-run"], default_map=given) as context,
    ):
        deploy.invoke(context)
    return printed.getvalue(), "what trimaran deploy render would create", changes


def _pair(variable: str) -> tuple[str, str]:
    name, separator, value = variable.partition("=")
    if not separator:
        raise ConfigError(f"--env {variable}: write NAME=VALUE")
    return name, value


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ConfigError(f"something listens on port {port} already; choose another --port") from None
