"""What ``trimaran.toml`` says to the commands that deploy and check."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import click

from serve.errors import ConfigError
from serve.setting_file import FILE, FileSource, as_variable, as_variables, platform_section, read_sections
from serve.setting_values import unreadable
from serve.settings import PREFIX, Settings
from trimaran.config.schema import file_options

Json = dict[str, Any]
OF_PROCESS = frozenset({"host", "port", "model", "log_format"})
"""Settings that a deploy decides by itself, or takes from an option of its own."""


def defaults() -> Json:
    """Defaults of options, as click wants them: for ``deploy runpod`` and ``deploy render``.

    Raises:
        ConfigError: a section has a key that is no option.
    """
    from trimaran.deploy.render import render  # noqa: PLC0415
    from trimaran.deploy.runpod import runpod  # noqa: PLC0415

    commands = {"runpod": runpod, "render": render}
    return {"deploy": {name: platform_options(name, command) for name, command in commands.items()}}


def platform_options(platform: str, command: click.Command) -> Json:
    """A platform's section by the names of a command's parameters.

    Raises:
        ConfigError: a key that is no option of the command.
    """
    options = file_options(command)
    given = platform_section(platform, options)
    return {str(options[key].name): _processed(platform, command, options[key], given[key]) for key in given}


def _processed(platform: str, command: click.Command, option: click.Option, value: Any) -> Any:
    """A value as the option has it that was given on the command line."""
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    try:
        if isinstance(value, list) and not option.multiple:
            raise click.BadParameter("it takes one value, not a list")
        return option.process_value(click.Context(command), values if option.multiple else values[0])
    except click.BadParameter as error:
        key = str(option.opts[0]).removeprefix("--").replace("-", "_")
        raise ConfigError(f"{FILE}: [{platform}] {key} = {value!r}: {error.message}") from None


def dotenv() -> dict[str, str]:
    """What ``.env`` says.

    Raises:
        ConfigError: it cannot be read.
    """
    from dotenv import dotenv_values  # noqa: PLC0415

    path = Path(".env")
    try:
        return {name: value for name, value in dotenv_values(path).items() if value}
    except (UnicodeDecodeError, OSError) as error:
        raise unreadable(path, error) from None


def emulated_variables() -> dict[str, str]:
    """The files' settings and Modal's section as variables, for a deploy that runs in another folder.

    Raises:
        ConfigError: something is wrong in the file.
    """
    given = FileSource(Settings)()
    if (folder := Path(str(given.get("model", "")))).is_dir() and given.get("model"):
        given["model"] = str(folder.absolute())
    file = as_variables(given, PREFIX) | as_variables(read_sections().get("modal", {}), PREFIX + "MODAL_")
    return file | {name: value for name, value in dotenv().items() if name.startswith(PREFIX)}


def deploy_variables() -> dict[str, str]:
    """The file's settings as variables of a container."""
    given = {name: value for name, value in FileSource(Settings)().items() if name not in OF_PROCESS}
    return as_variables(given, PREFIX)


def in_force(setting: str) -> str:
    """A setting of the environment, else of ``.env``, else of the file, as text; empty: none of them has it.

    Raises:
        ConfigError: something is wrong in one of the files.
    """
    variable = PREFIX + setting.upper()
    given = os.environ.get(variable) or dotenv().get(variable)
    return given or as_variable(FileSource(Settings)().get(setting, ""))


def model_in_force() -> str:
    """The model that the server would take; empty: none is named."""
    return in_force("model")


def engine_in_force() -> str:
    """The engine that is named; empty: none is."""
    return in_force("engine")
