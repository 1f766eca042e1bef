"""``docs/reference/cli.md``, made from the command itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

HEADER = """\
# The `trimaran` command

Data goes to standard output, progress and messages to standard error. Only `trimaran deploy runpod|render delete` asks,
unless `--yes` is given. What is left out may come from `trimaran.toml`:
[first deployment](../guides/first-deployment.md).

| exit status | what it says |
|---|---|
| 0 | done, or nothing found |
| 1 | it failed, was interrupted, or found something: findings, a model that fits nowhere |
| 2 | a setting or an option is wrong, or a credential is missing; the message names it and the remedy |
| 3 | the model cannot be loaded; `trimaran verify`: no answer |
| 4 | `trimaran status`: a service is stopped or failed |
| 5, 6 | `trimaran deploy --verify`: a check failed, and the deploy was rolled back (5) or could not be (6) |
| 70 | the engine died (`trimaran run`) |

This page is made by `scripts/reference`.
"""


def cli_reference(command: click.Group, name: str) -> str:
    """The page for a command and everything below it, in Markdown."""
    return HEADER + "".join(_sections(command, name))


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """The command and all below it, each with its full name."""
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")


def _sections(command: click.Group, name: str) -> Iterator[str]:
    for path, one in commands(command, name):
        if path == name:
            continue
        lines = ["", f"## `{path}`", "", _text(one), "", "```", _usage(one, path), "```"]
        if options := _options(one):
            lines += ["", "| option | default | what it does |", "|---|---|---|", *options]
        if one.epilog:
            example, _, more = one.epilog.partition("\n\n")
            lines += ["", "```bash", example.removeprefix("Example: "), "```", *(["", more] if more else [])]
        yield "\n".join(lines) + "\n"


def _text(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").replace("<", "&lt;")


def _usage(command: click.Command, path: str) -> str:
    context = click.Context(command, info_name=path)
    return " ".join([path, *command.collect_usage_pieces(context)])


def _options(command: click.Command) -> list[str]:
    return [_row(option) for option in command.params if isinstance(option, click.Option) and not option.hidden]


def _row(option: click.Option) -> str:
    context = click.Context(click.Command("any"))
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    kind = "" if option.is_flag else f" {option.make_metavar(context)}"
    default = option.default
    shown = (
        "" if default in (None, (), "") or option.is_flag or callable(default) or option.multiple else f"`{default}`"
    )
    if not isinstance(default, str | int | float):
        shown = ""
    return f"| {names}{_cell(kind)} | {shown} | {_cell(option.help or '')} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
