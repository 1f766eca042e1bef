"""``trimaran emulate render``."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import click

from serve.errors import ConfigError


@click.command(epilog="Example: trimaran emulate render deploy/render/render.yaml --env SERVE_ENGINE=echo")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), default="render.yaml")
@click.option("--service", help="Its name in the Blueprint.  Default: the first web service.")
@click.option("--plan", help="Another instance type than the Blueprint's.")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=10000, show_default=True, help="PORT; Render's is 10000."
)
@click.option(
    "--env", "variables", multiple=True, metavar="NAME=VALUE", help="In place of the Blueprint's; repeatable."
)
@click.pass_context
def render(
    context: click.Context, file: Path, service: str | None, plan: str | None, port: int, variables: tuple[str, ...]
) -> None:
    """Run a Blueprint's service here under Render's rules, and report each as kept or broken.

    The real server gets PORT, only the Blueprint's variables, an empty file system and the plan's memory; it is checked
    as Render checks it, ends by SIGTERM in the middle of a stream, and starts anew.  Status 1 when a rule is broken.
    Not emulated: the build, the network, and the plan's share of the CPU beyond the number of threads.
    """
    from trimaran.emulate.render.rules import Verdict, judged  # noqa: PLC0415
    from trimaran.emulate.render.scene import read_scene  # noqa: PLC0415
    from trimaran.emulate.render.session import Session  # noqa: PLC0415
    from trimaran.platforms.render.check import check_blueprint  # noqa: PLC0415

    text = file.read_text(encoding="utf-8")
    changes = dict(_pair(variable) for variable in variables)
    scene = read_scene(text, name=service, plan=plan, port=port, changes=changes)
    _check_free(port)
    findings = [judged("Blueprint", False, str(problem)) for problem in check_blueprint(text, Path())]
    found = findings or [judged("Blueprint", True, f"{file}: nothing known is wrong")]
    for finding in found:
        click.echo(str(finding))
    with tempfile.TemporaryDirectory(prefix="trimaran-render-") as folder:
        for finding in Session(scene, Path(folder), lambda line: click.echo(f"  {line} ...", err=True)).run():
            found.append(finding)
            click.echo(str(finding))
    num_broken = sum(finding.verdict is Verdict.BROKEN for finding in found)
    click.echo(f"{num_broken} of {len(found)} rules broken" if num_broken else f"{len(found)} rules kept", err=True)
    context.exit(1 if num_broken else 0)


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
