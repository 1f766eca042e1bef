"""``trimaran deploy modal``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from serve.errors import ConfigError
from trimaran.deploy.proof import EXITS, carry_out, proof, verify_options

if TYPE_CHECKING:
    from serve.settings import Settings

PREFIX = "SERVE_MODAL_"
CHOSEN_BY = {"-e": "MODAL_ENVIRONMENT", "--env": "MODAL_ENVIRONMENT", "--profile": "MODAL_PROFILE"}


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Example: SERVE_MODEL=Qwen/Qwen3-4B SERVE_MODAL_GPU=L4 SERVE_API_KEYS=... trimaran deploy modal --verify\n\n"
    f"{EXITS}.",
)
@click.option("--name", help="The app's name.  Default: SERVE_MODAL_NAME, else from the model's.")
@verify_options
@click.argument("arguments", metavar="[MODAL'S OWN OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
def modal(name: str | None, arguments: tuple[str, ...], **options: Any) -> None:
    """Run `modal deploy deploy/modal/app.py`, and note it in the ledger.

    Settings are SERVE_* variables, as for the command itself; docs/reference/modal.md lists those of Modal.  Other
    options, such as --strategy, go to Modal's command; MODAL_ENVIRONMENT and MODAL_PROFILE choose where.
    """
    from trimaran.deploy.on_modal import ModalSide  # noqa: PLC0415
    from trimaran.platforms.modal import client  # noqa: PLC0415

    client.check_adapter()
    for option in arguments:
        if variable := CHOSEN_BY.get(option.partition("=")[0]):
            raise ConfigError(
                f"{option}: set {variable} instead, so that status, logs and rollback find the app as well"
            )
    name, settings, knobs = _read(name)
    asked = proof(options)
    carry_out(ModalSide(name, settings, knobs, arguments), asked, wait=True, as_json=options["as_json"])


def _read(name: str | None) -> tuple[str, Settings, dict[str, str]]:
    """The app's name, and what decides its configuration: settings from wherever they come, and Modal's knobs."""
    from serve import load_settings  # noqa: PLC0415
    from serve.knobs import app_name  # noqa: PLC0415
    from serve.setting_file import as_variables, read_sections  # noqa: PLC0415

    settings = load_settings(host="127.0.0.1")
    given = {key: value for key, value in os.environ.items() if key.startswith(PREFIX) and value}
    knobs = {**as_variables(read_sections().get("modal", {}), PREFIX), **given}
    return name or knobs.get("SERVE_MODAL_NAME") or app_name(settings.served_name), settings, knobs
