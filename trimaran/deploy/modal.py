"""``trimaran deploy modal``."""

from __future__ import annotations

import os
from typing import Any

import click

from serve.errors import ConfigError, ServeError
from trimaran import ledger

PREFIX = "SERVE_MODAL_"
CHOSEN_BY = {"-e": "MODAL_ENVIRONMENT", "--env": "MODAL_ENVIRONMENT", "--profile": "MODAL_PROFILE"}


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Example: SERVE_MODEL=Qwen/Qwen3-4B SERVE_MODAL_GPU=L4 SERVE_API_KEYS=... trimaran deploy modal",
)
@click.option("--name", help="The app's name.  Default: SERVE_MODAL_NAME, else from the model's.")
@click.argument("arguments", metavar="[MODAL'S OWN OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
def modal(name: str | None, arguments: tuple[str, ...]) -> None:
    """Run `modal deploy deploy/modal/app.py`, and note it in the ledger.

    Settings are SERVE_* variables, as for the command itself; docs/reference/modal.md lists those of Modal.  Other
    options, such as --strategy, go to Modal's command; MODAL_ENVIRONMENT and MODAL_PROFILE choose where.
    """
    from trimaran.platforms.modal import client  # noqa: PLC0415

    client.check_adapter()
    for option in arguments:
        if variable := CHOSEN_BY.get(option.partition("=")[0]):
            raise ConfigError(
                f"{option}: set {variable} instead, so that status, logs and rollback find the app as well"
            )
    name, configuration = _read(name)
    with ledger.recording("modal", name) as entry:
        entry.configuration = ledger.fingerprint(configuration)
        click.echo("$ modal deploy deploy/modal/app.py", err=True)
        entry.url = client.deploy(
            arguments, {"SERVE_MODAL_NAME": name}, lambda line: click.echo(line, nl=False, err=True)
        )
        note_version(entry)
    click.echo(entry.url)


def note_version(entry: ledger.Entry) -> None:
    """What Modal calls the newest deployment: a version, and the commit of the checkout that was sent."""
    from trimaran.platforms.modal import client  # noqa: PLC0415

    entry.result = ledger.LIVE
    try:
        newest = client.history(entry.name)[0]
    except (ServeError, LookupError) as error:
        click.echo(f"Note: the version is not known: {error}", err=True)
        return
    entry.revision = newest.get("version")
    entry.artifact = newest.get("commit")


def _read(name: str | None) -> tuple[str, dict[str, Any]]:
    """The app's name, and what decides its configuration: settings from wherever they come, and Modal's knobs."""
    from serve import load_settings  # noqa: PLC0415
    from serve.knobs import app_name  # noqa: PLC0415
    from serve.setting_file import as_variables, read_sections  # noqa: PLC0415

    settings = load_settings(host="127.0.0.1")
    given = {key: value for key, value in os.environ.items() if key.startswith(PREFIX) and value}
    knobs = {**as_variables(read_sections().get("modal", {}), PREFIX), **given}
    name = name or knobs.get("SERVE_MODAL_NAME") or app_name(settings.served_name)
    return name, {**settings.model_dump(mode="json"), **knobs, "SERVE_MODAL_NAME": name}
