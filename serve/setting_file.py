"""``trimaran.toml``: settings in a file beside the project, below the environment and above the defaults.

Keys are settings' names, as in ``SERVE_<NAME>``, grouped in sections; platforms have sections of their own.  Secrets
are not read from it.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from serve.errors import ConfigError
from serve.setting_values import secret_names, written

FILE = Path("trimaran.toml")
"""In the folder where the command runs."""

SECTIONS = ("model", "serve", "limits", "auth")
PLATFORMS = ("modal", "runpod", "render")

_OF_MODEL = frozenset(
    {
        "model", "model_folders", "model_revision", "model_name", "chat_template", "embedding_model",
        "embedding_revision", "fold_messages", "allow_control_tokens", "tool_parser", "tool_prompt",
        "trust_remote_code", "engine", "device", "dtype", "max_model_len",
    }
)  # fmt: skip
_OF_AUTH = frozenset({"allow_anonymous"})


def section_of(setting: str) -> str:
    """The section in which a setting is written."""
    if setting in _OF_MODEL:
        return "model"
    if setting in _OF_AUTH:
        return "auth"
    return "limits" if setting.startswith("limit_") else "serve"


def read_sections() -> dict[str, dict[str, Any]]:
    """The file's sections; empty when there is no file.

    Raises:
        ConfigError: it is not TOML, or has a section that there is not.
    """
    try:
        document = tomllib.loads(FILE.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{FILE.absolute()} cannot be read: {error}") from None
    sections: dict[str, dict[str, Any]] = {}
    for name, value in document.items():
        if name not in (*SECTIONS, *PLATFORMS):
            raise ConfigError(f"{FILE}: {_unknown(f'[{name}]', 'section', name, (*SECTIONS, *PLATFORMS))}")
        if not isinstance(value, dict):
            raise ConfigError(f"{FILE}: {name} must be a section: write [{name}] on a line of its own")
        sections[name] = cast("dict[str, Any]", value)
    return sections


def file_settings(settings: Collection[str], secrets: Collection[str]) -> dict[str, Any]:
    """The settings that the file gives.

    Args:
        settings: The names of all settings.
        secrets: Those that must not be in a file.

    Raises:
        ConfigError: a key that is no setting, is in the wrong section, or is a secret; with the remedy.
    """
    found: dict[str, Any] = {}
    for section, entries in read_sections().items():
        if section in PLATFORMS:
            continue
        for key, value in entries.items():
            if key not in settings:
                known = [name for name in settings if name not in secrets]
                raise ConfigError(f"{FILE}: {_unknown(f'[{section}] {key}', 'setting', key, known)}")
            if key in secrets:
                raise ConfigError(
                    f"{FILE}: [{section}] {key} is a secret, which does not belong in a file: "
                    f"export SERVE_{key.upper()}=... instead"
                )
            if section_of(key) != section:
                raise ConfigError(f"{FILE}: {key} belongs in [{section_of(key)}], not in [{section}]")
            found[key] = value
    return found


class FileSource(PydanticBaseSettingsSource):
    """The file as a source of settings."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not called: all values come at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """All settings that the file gives; raises ``ConfigError`` for what is wrong in it."""
        fields = self.settings_cls.model_fields
        return file_settings(fields, secret_names(fields))


def platform_section(platform: str, known: Iterable[str]) -> dict[str, Any]:
    """A platform's section.

    Raises:
        ConfigError: a key that is none of ``known``.
    """
    names = list(known)
    entries = read_sections().get(platform, {})
    for key in entries:
        if key not in names:
            raise ConfigError(f"{FILE}: {_unknown(f'[{platform}] {key}', 'option', key, names)}")
    return entries


def as_variable(value: Any) -> str:
    """A value as an environment variable has it."""
    if isinstance(value, list | tuple):
        return ",".join(map(as_variable, cast("list[Any]", value)))
    return written(value)


def as_variables(values: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Several of them, by their full names."""
    return {prefix + name.upper(): as_variable(value) for name, value in values.items()}


def _unknown(shown: str, kind: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"{shown} is no {kind}; " + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(names)}")
