"""``trimaran config``."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="Example: SERVE_MAX_QUEUE=8 trimaran config --origin",
)
@click.option("--origin", "shows_origin", is_flag=True, help="Say of each value where it came from.")
@click.option("--all", "shows_all", is_flag=True, help="Defaults too.")
@click.option("--schema", "wants_schema", is_flag=True, help="Print the JSON Schema of trimaran.toml, for editors.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("arguments", metavar="[OPTIONS OF THE SERVER]...", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def config(
    context: click.Context,
    shows_origin: bool,
    shows_all: bool,
    wants_schema: bool,
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    """Print the settings in force here, secrets masked: flags win over the environment, over .env, over trimaran.toml.

    Without --origin or --all only what is set.  Options of the server, such as --max-queue 8, count as flags.  Status 2
    when the server would refuse these settings; the message on standard error says why.
    """
    from serve.__main__ import given_options  # noqa: PLC0415
    from serve.errors import ConfigError  # noqa: PLC0415
    from serve.settings import load_settings  # noqa: PLC0415
    from trimaran.config.origins import values  # noqa: PLC0415

    if wants_schema:
        from trimaran.config.schema import schema_text  # noqa: PLC0415

        click.echo(schema_text(), nl=False)
        return
    flags = given_options(arguments)
    found = values(flags)
    shown = [value for value in found if shows_origin or shows_all or value.origin != "default"]
    if as_json:
        click.echo(json.dumps([asdict(value) for value in shown], indent=2))
    else:
        width = max((len(value.name) for value in shown), default=0)
        for value in shown:
            line = f"{value.name:<{width}}  {value.value}"
            click.echo(f"{line}  ({value.origin})" if shows_origin else line)
    try:
        load_settings(**flags)
    except ConfigError as error:
        click.echo(f"trimaran: {error.message}", err=True)
        context.exit(error.exit_status)
