"""The commands.  What they share: names come from the ledger, ``--json`` on standard output, nothing is ever asked."""

from __future__ import annotations

import dataclasses
import json

import click

from serve.errors import ConfigError, ServeError
from trimaran import ledger
from trimaran.deploy.answer import teller
from trimaran.operate.service import (
    FAILED,
    PLATFORMS,
    STOPPED,
    Line,
    Status,
    choose_name,
    open_service,
)
from trimaran.progress import waiting
from trimaran.table import table

EXITS = (
    "Exit status: 0 done; 1 the platform refused, failed or did not answer; 2 wrong usage, no credentials, or no such "
    "service or number"
)
NOT_LIVE = 4
"""Exit status of ``status`` where a service is there and answers nobody."""

platform_argument = click.argument("platform", type=click.Choice(PLATFORMS))
name_option = click.option("--name", help="The service's name.  Default: the only one in the ledger.")
id_option = click.option("--id", "service_id", help="The service's id, where several have the name (RunPod).")
json_option = click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")


@click.command(epilog=f"Example: trimaran history render --name chat --limit 5\n\n{EXITS}.")
@click.argument("platform", type=click.Choice(PLATFORMS), required=False)
@click.option("--name", help="Only the service of that name.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Newest entries.")
@json_option
def history(platform: str | None, name: str | None, limit: int, as_json: bool) -> None:
    """Show the deploys and rollbacks of this project, newest first, from its ledger.

    The ledger is .trimaran/ledger.jsonl in the project's folder, or the file that TRIMARAN_LEDGER names.  It knows what
    was done with this command; `trimaran status` asks the platform.  Nothing is called.
    """
    chosen = [entry for entry in _entries() if platform in (None, entry.platform) and name in (None, entry.name)]
    newest = chosen[::-1][:limit]
    if as_json:
        click.echo(json.dumps([{"number": entry.number, **entry.stored()} for entry in newest], indent=2))
        return
    if not newest:
        click.echo(f"Nothing was deployed yet that {ledger.path()} knows of.", err=True)
        return
    headings = ("platform", "name", "n", "time", "action", "result", "revision", "artifact", "configuration", "verify")
    click.echo(table(headings, [_row(entry) for entry in newest]))


def _row(entry: ledger.Entry) -> tuple[str, ...]:
    action = entry.action if entry.restores is None else f"{entry.action} to {entry.restores}"
    result = entry.result if not entry.error else f"{entry.result}: {entry.error.splitlines()[0][:60]}"
    return (
        *(entry.platform, entry.name, str(entry.number), entry.time, action, result),
        *(entry.revision or "-", _short(entry.artifact), (entry.configuration or "-").removeprefix("sha256:")[:8]),
        entry.verify or "-",
    )


def _short(artifact: str | None) -> str:
    """An image with the first digits of its digest."""
    image, at, digest = (artifact or "-").partition("@sha256:")
    return f"{image}{at}{digest[:12]}"


@click.command(
    epilog=f"Example: trimaran rollback runpod 3 --name chat\n\n{EXITS}.",
)
@platform_argument
@click.argument("number", metavar="[N]", type=click.IntRange(1), required=False)
@name_option
@id_option
@click.option("--wait/--no-wait", default=None, help="Until it is live.  Default: yes, but not on RunPod.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def rollback(
    platform: str,
    number: int | None,
    name: str | None,
    service_id: str | None,
    wait: bool | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Return to an earlier deploy: number N of `trimaran history`, or the platform's own version before.

    Modal returns to code and settings of then.  Render and RunPod return to the image or build of then; variables,
    sizes and secrets stay as they are now.  The rollback is an entry of the ledger itself.
    """
    entries = _entries()
    name = choose_name(platform, name, entries)
    own = [entry for entry in entries if (entry.platform, entry.name) == (platform, name)]
    to = _target(own, number, f"{name} on {platform}")
    if to is not None:
        click.echo(f"{name}: back to number {to.number}, {to.time}, {_short(to.artifact)}", err=True)
        if to.verify == ledger.NOT_PASSED:
            click.echo(f"Note: number {to.number} failed its verification.", err=True)
        _note_configuration(platform, own, to)
    if dry_run:
        click.echo("Dry run: nothing was changed.", err=True)
        return
    with waiting(f"Rolling back on {platform}"):
        open_service(platform, name, service_id).rollback(to, wait=wait, tell=teller(as_json))


def _target(own: list[ledger.Entry], number: int | None, where: str) -> ledger.Entry | None:
    if number is None:
        return None
    to = next((entry for entry in own if entry.number == number), None)
    if to is None:
        known = ", ".join(str(entry.number) for entry in own if entry.result != ledger.FAILED) or "none"
        raise ConfigError(f"the ledger has no number {number} of {where}; there are: {known}.  See: trimaran history")
    if to.result == ledger.FAILED:
        raise ConfigError(f"number {number} of {where} failed and never ran; choose another of: trimaran history")
    return to


def _note_configuration(platform: str, own: list[ledger.Entry], to: ledger.Entry) -> None:
    now = next((entry for entry in reversed(own) if entry.result != ledger.FAILED and entry.configuration), None)
    if platform != "modal" and now and to.configuration and now.configuration != to.configuration:
        click.echo(
            f"Note: the configuration was another then ({to.configuration}, now {now.configuration}); {platform} "
            "returns to the image only.  Deploy again where variables or sizes must go back too.",
            err=True,
        )


@click.command(epilog=f"Example: trimaran status runpod --name chat --json\n\n{EXITS}; 4 stopped or failed.")
@click.argument("platform", type=click.Choice(PLATFORMS), required=False)
@name_option
@id_option
@json_option
@click.pass_context
def status(
    context: click.Context, platform: str | None, name: str | None, service_id: str | None, as_json: bool
) -> None:
    """Ask the platforms how services are: one, or all that the ledger knows of.

    States: live (requests are answered, perhaps after a cold start), deploying, failed, stopped.
    """
    entries = _entries()
    if platform:
        wanted = [(platform, choose_name(platform, name, entries))]
    else:
        wanted = sorted({(entry.platform, entry.name) for entry in entries if name in (None, entry.name)})
    if not wanted:
        raise ConfigError(f"name a platform: {', '.join(PLATFORMS)}; the ledger {ledger.path()} knows of no service")
    found: list[Status] = []
    failures: list[ServeError] = []
    for where, called in wanted:
        try:
            with waiting(f"Asking {where}"):
                found.append(open_service(where, called, service_id).status())
        except ServeError as error:
            if len(wanted) == 1:
                raise
            failures.append(error)
            click.echo(f"{where} {called}: {error.message}", err=True)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    else:
        click.echo("\n\n".join(map(_described, found)))
    if failures:
        context.exit(getattr(failures[0], "exit_status", 1))
    context.exit(NOT_LIVE if any(one.state in (FAILED, STOPPED) for one in found) else 0)


def _described(one: Status) -> str:
    running = "" if one.running is None else f", {one.running} running"
    lines = [f"{one.platform}  {one.name}  {one.service}: {one.state} ({one.detail}{running})"]
    lines += [f"  {label}  {value}" for label, value in (("at", one.url), ("runs", one.artifact)) if value]
    if one.deploys:
        rows = [(made.revision, made.state, made.time, _short(made.artifact)) for made in one.deploys]
        lines += ["  " + line for line in table(("deploy", "state", "time", "artifact"), rows).splitlines()]
    return "\n".join(lines)


@click.command(epilog=f"Example: trimaran logs modal --name chat --follow\n\n{EXITS}; 130 Ctrl-C.")
@platform_argument
@name_option
@id_option
@click.option("--tail", type=click.IntRange(1, 5000), default=100, show_default=True, help="Latest lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on with lines as they come, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: time, source, text.")
@click.pass_context
def logs(
    context: click.Context,
    platform: str,
    name: str | None,
    service_id: str | None,
    tail: int,
    follow: bool,
    as_json: bool,
) -> None:
    """Show a service's latest log lines, oldest first, and those that come."""
    called = choose_name(platform, name, _entries())
    with waiting(f"Asking {platform}"):
        lines = open_service(platform, called, service_id).logs(tail, follow=follow)
        first = None if follow else next(lines, None)
    try:
        if first is not None:
            click.echo(_line_text(first, as_json))
        for line in lines:
            click.echo(_line_text(line, as_json))
    except KeyboardInterrupt:
        context.exit(130)


def _line_text(line: Line, as_json: bool) -> str:
    fields = dataclasses.asdict(line)
    return json.dumps(fields, ensure_ascii=False) if as_json else "  ".join(text for text in fields.values() if text)


def _entries() -> list[ledger.Entry]:
    """The ledger, oldest first; lines that cannot be read are told once and passed over."""
    try:
        entries, broken = ledger.read()
    except OSError as error:
        click.echo(f"Note: the ledger {ledger.path()} cannot be read: {error.strerror or error}", err=True)
        return []
    if broken:
        click.echo(f"Note: {ledger.path()} has lines that are no entries: {', '.join(map(str, broken))}", err=True)
    return entries
