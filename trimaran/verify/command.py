"""``trimaran verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from trimaran.progress import waiting

if TYPE_CHECKING:
    from trimaran.verify.outcome import Outcome
    from trimaran.verify.target import Target

NOT_AS_PROMISED = 1
NO_ANSWER = 3


@click.command(epilog="Example: trimaran verify https://me--my-llm.modal.run --key sk-... --local ./my-model")
@click.option("--key", envvar="SERVE_API_KEYS", default="", help="API key. Default: the first of SERVE_API_KEYS.")
@click.option("--model", default="", help="The model's id. Default: the first that the server lists.")
@click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="Sent with every request.")
@click.option("--local", metavar="MODEL", help="Compare greedy tokens with MODEL, served on this machine.")
@click.option("--reference", type=click.Path(path_type=Path), help="Compare greedy tokens with those of this file.")
@click.option("--record", type=click.Path(path_type=Path), help="Write this server's greedy tokens to a file, and end.")
@click.option("--concurrency", type=click.IntRange(1, 256), default=4, show_default=True, help="Streams at once.")
@click.option(
    "--wait", type=click.FloatRange(0, 3600), default=300, show_default=True, help="Seconds for a cold start."
)
@click.option("--timeout", type=click.FloatRange(1, 3600), default=120, show_default=True, help="Seconds of a request.")
@click.option("--redeploy", metavar="COMMAND", help="Run COMMAND while streams are open; none may be cut.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.argument("url")
def verify(
    url: str,
    key: str,
    model: str,
    headers: tuple[str, ...],
    local: str | None,
    reference: Path | None,
    record: Path | None,
    concurrency: int,
    wait: float,
    timeout: float,
    redeploy: str | None,
    as_json: bool,
) -> None:
    """Prove that the server at URL gives the right tokens, streams, refuses what it should and frees what it must.

    Sends a few dozen short requests.  Without --local or --reference the tokens themselves are not judged.

    Exit status: 0 everything is as promised, 1 a check failed, 2 wrong arguments or key, 3 no answer.
    """
    from trimaran.verify import reference as golden  # noqa: PLC0415
    from trimaran.verify import report  # noqa: PLC0415
    from trimaran.verify.checks import checks, cold_start, first_model  # noqa: PLC0415
    from trimaran.verify.target import Target  # noqa: PLC0415

    check_address(url)
    _check_listener(url)
    wanted = golden.read(reference) if reference else None
    with Target(url, key.partition(",")[0].strip(), timeout, parse_headers(headers)) as target:
        _wait_until_ready(target, wait)
        target.model = model or first_model(target)
        if record:
            golden.write(record, target, golden.record(target))
            click.echo(f"Recorded in {record}")
            return
        if local:
            click.echo(f"Asking {local} on this machine ...", err=True)
            with golden.local_server(local) as own:
                wanted = golden.record(own)
        outcomes: list[Outcome] = []
        for outcome in checks(target, wanted, concurrency, redeploy, wait):
            outcomes.append(outcome)
            click.echo(report.line(outcome), err=as_json)
        phases = cold_start(target)
        if as_json:
            click.echo(report.as_json(target, outcomes, phases))
        else:
            click.echo("\n".join(["", *report.waterfall(phases), "", report.summary(outcomes)]))
    if not report.is_good(outcomes):
        sys.exit(NOT_AS_PROMISED)


def _wait_until_ready(target: Target, wait_s: float) -> None:
    from trimaran.verify.checks import ready_within  # noqa: PLC0415

    with waiting("Waiting until the server is ready"):
        why = ready_within(target, wait_s)
    if why:
        click.echo(f"trimaran: {why}", err=True)
        sys.exit(NO_ANSWER)


def _check_listener(url: str) -> None:
    from trimaran.verify.target import nobody_there  # noqa: PLC0415

    if not is_told_to_wait() and (why := nobody_there(url)):
        click.echo(f"trimaran: {why}", err=True)
        sys.exit(NO_ANSWER)


def check_address(url: str) -> None:
    """Refuse what no server can have, which would else be waited for.

    Raises:
        click.UsageError: it is not ``http://HOST`` or ``https://HOST``.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that stays open
        is_address = False
    if not is_address:
        raise click.UsageError(f"{url!r} is no server's address: write it as https://my.server")


def is_told_to_wait() -> bool:
    """Whether the command was given --wait."""
    return click.get_current_context().get_parameter_source("wait") is not ParameterSource.DEFAULT


def parse_headers(given: tuple[str, ...]) -> dict[str, str]:
    """``NAME:VALUE`` options as headers."""
    headers: dict[str, str] = {}
    for text in given:
        name, colon, value = text.partition(":")
        if not colon:
            raise click.UsageError(f"--header {text!r}: write NAME:VALUE")
        headers[name.strip()] = value.strip()
    return headers
