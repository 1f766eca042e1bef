"""What a platform's adapter reads besides the server's settings, on the machine that deploys.

Each refusal names the variable, its value and the remedy: in the cloud the same mistake would cost minutes, or money.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
import shlex
from collections.abc import Mapping

from serve.errors import ConfigError
from serve.setting_file import as_variables, platform_section
from serve.settings import PREFIX, Settings


class Knobs:
    """Variables with one prefix; below them, ``trimaran.toml`` has a section for them, such as ``[modal]``.

    Args:
        prefix: Such as ``SERVE_MODAL_``.
        table: Name without the prefix to default and description.

    Raises:
        ConfigError: the environment has a variable with this prefix that the table lacks.
    """

    def __init__(self, prefix: str, table: Mapping[str, tuple[str, str]]) -> None:
        self._prefix = prefix
        self._table = table
        known = [prefix + name for name in table]
        for name in sorted(os.environ):
            if name.startswith(prefix) and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else "."
                raise ConfigError(f"{name} is no knob{hint} There are: {', '.join(table)}")
        section = prefix.split("_")[1].lower()
        self._file = as_variables(platform_section(section, [name.lower() for name in table]), prefix)

    def given(self) -> dict[str, str]:
        """Those that are set."""
        return {self._prefix + name: value for name in self._table if (value := self._given(name))}

    def _given(self, name: str) -> str:
        return os.environ.get(self._prefix + name, "").strip() or self._file.get(self._prefix + name, "")

    def text(self, name: str) -> str:
        """A value as it is."""
        return self._given(name) or self._table[name][0]

    def names(self, name: str) -> list[str]:
        """A list, separated by commas."""
        return [part for item in self.text(name).split(",") if (part := item.strip())]

    def choice(self, name: str, *choices: str) -> str:
        """One of ``choices``."""
        value = self.text(name)
        if value not in choices:
            raise ConfigError(f"{self._prefix}{name}={value!r} is none of {', '.join(choices)}")
        return value

    def count(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number within bounds; ``default`` where neither a value nor one in the table is."""
        value = self.number(name, low, high)
        if value is not None and value != int(value):
            raise ConfigError(f"{self._prefix}{name}={self.text(name)!r} is not a whole number")
        return default if value is None else int(value)

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number within bounds; None where neither a value nor a default is."""
        text = self.text(name)
        if not text:
            return None
        try:
            number = float(text)
        except ValueError:
            raise ConfigError(f"{self._prefix}{name}={text!r} is not a number") from None
        if not low <= number <= high:
            raise ConfigError(f"{self._prefix}{name}={text} is not between {low:g} and {high:g}")
        return number


def app_name(served_name: str) -> str:
    """What a deployment is called that was given no name: small letters, digits and dashes, at most 48."""
    return re.sub(r"[^a-z0-9]+", "-", served_name.lower())[:48].strip("-")


def check_keys(settings: Settings, command: str) -> None:
    """Refuse to deploy what anybody could use.

    Args:
        settings: With which it would be deployed.
        command: The one that was typed, without its variables.

    Raises:
        ConfigError: no keys, with the ready command and a fresh one.
    """
    if settings.knows_callers or settings.allow_anonymous:
        return
    given = [f"{name}={shlex.quote(value)}" for name, value in sorted(os.environ.items()) if name.startswith(PREFIX)]
    ready = " ".join([*given, f"SERVE_API_KEYS=sk-{secrets.token_hex(24)}", command])
    raise ConfigError(
        "SERVE_API_KEYS is not set, and anybody could use the address. With a fresh key, which you keep:\n\n"
        f"    {ready}\n\nSERVE_ALLOW_ANONYMOUS=true answers everybody."
    )
