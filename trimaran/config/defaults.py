"""What ``trimaran.toml`` says to the commands that deploy and check."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from serve.setting_file import FileSource, as_variables, platform_section, read_sections
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
    return {str(options[key].name): _as_given(options[key], value) for key, value in given.items()}


def _as_given(option: click.Option, value: Any) -> Any:
    return [value] if option.multiple and isinstance(value, str | int | float) else value


def emulated_variables() -> dict[str, str]:
    """The file's settings and Modal's section as variables, for a deploy that runs in another folder.

    Raises:
        ConfigError: something is wrong in the file.
    """
    given = FileSource(Settings)()
    if (folder := Path(str(given.get("model", "")))).is_dir() and given.get("model"):
        given["model"] = str(folder.absolute())
    return as_variables(given, PREFIX) | as_variables(read_sections().get("modal", {}), PREFIX + "MODAL_")


def deploy_variables() -> dict[str, str]:
    """The file's settings as variables of a container."""
    given = {name: value for name, value in FileSource(Settings)().items() if name not in OF_PROCESS}
    return as_variables(given, PREFIX)


def model_in_force() -> str:
    """The model of the environment, else of the file; empty: neither names one."""
    return os.environ.get("SERVE_MODEL", "") or str(FileSource(Settings)().get("model", ""))


def engine_in_force() -> str:
    """The engine of the environment, else of the file; empty: neither names one."""
    return os.environ.get("SERVE_ENGINE", "") or str(FileSource(Settings)().get("engine", ""))
