"""Every value that is in force, and where it came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from serve.setting_file import FILE, FileSource, as_variable, as_variables, platform_section, read_sections
from serve.setting_values import secret_names
from serve.settings import PREFIX, Settings
from trimaran.config.defaults import defaults, dotenv

MASK = "********"
_CREDENTIALS = re.compile(r"//\S*@")
"""In an address, up to the last ``@``: a password may hold one too."""

_NAMED = re.compile(
    r"((?:^|[?&,;\s])[^=?&,;\s]*(?:key|token|secret|passw|pwd|auth|credential|sig)[^=?&,;\s]*=)[^&,;\s]+", re.I
)
"""``NAME=VALUE`` of a secret: in an address, or in a list of variables."""

_TOKENS = re.compile(r"\b(hf_|rpa_|rnd_|gh[pousr]_|sk-|ak-|as-|wk-|ws-)[\w-]{8,}")
"""What tokens of the Hub, of the platforms and of servers look like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One setting: its variable, its value in words (secrets masked), and ``flag``, ``environment``, ``file``..."""

    name: str
    value: str
    origin: str


def values(flags: Mapping[str, str]) -> list[Value]:
    """All settings, then what platforms' adapters and deploys are told.

    Args:
        flags: Settings that were given on the command line.
    """
    secrets = secret_names(Settings.model_fields)
    local, file = dotenv(), FileSource(Settings)()
    found: list[Value] = []
    for name, field in Settings.model_fields.items():
        variables = (PREFIX + name.upper(), *(("PORT",) if name == "port" else ()))
        text, origin = "" if field.default is None else as_variable(field.default), "default"
        if name in file:
            text, origin = as_variable(file[name]), str(FILE)
        for where, entries in ((".env", local), ("environment", os.environ)):
            for variable in reversed(variables):
                if entries.get(variable):
                    text, origin = str(entries[variable]), f"{where} {variable}"
        if name in flags:
            text, origin = flags[name], f"flag --{name.replace('_', '-')}"
        shown = MASK if name in secrets and text else masked(text)
        found.append(Value(name=variables[0], value=shown, origin=origin))
    return [*found, *_of_platforms()]


def masked(text: str) -> str:
    """A value without what in it is, or looks like, a secret."""
    text = _CREDENTIALS.sub(f"//{MASK}@", text)
    return _TOKENS.sub(MASK, _NAMED.sub(rf"\1{MASK}", text))


def _of_platforms() -> Iterator[Value]:
    from trimaran.doctor.setup import modal_knobs  # noqa: PLC0415

    sections, knobs = read_sections(), modal_knobs()
    prefix = PREFIX + "MODAL_"
    known = [name.lower() for name in knobs] or sections.get("modal", {})
    file = as_variables(platform_section("modal", known), prefix)
    for name, (default, _) in knobs.items():
        variable = prefix + name
        text = os.environ.get(variable, "").strip()
        origin = f"environment {variable}" if text else str(FILE) if variable in file else "default"
        yield Value(name=variable, value=masked(text or file.get(variable, default)), origin=origin)
    defaults()  # refuses keys that are no options, and values that they do not take
    for platform in ("runpod", "render"):
        for key, value in sections.get(platform, {}).items():
            option = f"deploy {platform} --{key.replace('_', '-')}"
            yield Value(name=option, value=masked(as_variable(value)), origin=str(FILE))
