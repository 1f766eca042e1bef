"""The words that some settings may take, what else is known of a value, and what is said of a wrong one."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from serve.errors import ConfigError
from serve.folders import default_cache
from serve.records.address import kind_of


class EngineName(StrEnum):
    """Which engine answers."""

    TRANSFORMERS = "transformers"
    ECHO = "echo"
    REMOTE = "remote"


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class Dtype(StrEnum):
    """The model's number format."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class ToolParser(StrEnum):
    """Which family's tool calls the model writes; ``auto`` reads it off the chat template."""

    AUTO = "auto"
    NONE = "none"
    HERMES = "hermes"
    LLAMA = "llama"
    MISTRAL = "mistral"
    DEEPSEEK = "deepseek"
    KIMI = "kimi"
    KIMI_K3 = "kimi_k3"
    GEMMA = "gemma"
    HARMONY = "harmony"


class ToolPrompt(StrEnum):
    """How tools reach a model whose chat template knows none."""

    NONE = "none"
    GENERIC = "generic"


class ImageInput(StrEnum):
    """What becomes of an image in a message to a model that reads text only."""

    REFUSE = "refuse"
    NOTE = "note"


class LogFormat(StrEnum):
    """How log lines look; ``auto`` is text on a terminal and JSON elsewhere."""

    AUTO = "auto"
    TEXT = "text"
    JSON = "json"


def secret_names(fields: Mapping[str, FieldInfo]) -> frozenset[str]:
    """The settings that are never written into files, logs or images."""
    return frozenset(name for name, field in fields.items() if "Secret" in str(field.annotation))


def holds_model(folder: Path) -> bool:
    """Whether a checkpoint or an adapter lies there; unreadable counts, so that loading can say so."""
    try:
        return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    except PermissionError:
        return True


def with_mounted_model(values: dict[str, Any]) -> dict[str, Any]:
    """The settings' values with the model that a platform mounted, unless one is named."""
    folders = values.get("model_folders") or ()
    if values.get("model") or values.get("engine", EngineName.TRANSFORMERS) != EngineName.TRANSFORMERS:
        return values
    names = folders.split(",") if isinstance(folders, str) else folders
    mounted = [str(name).strip() for name in names if holds_model(Path(str(name).strip()))]
    return {**values, "model": mounted[0]} if mounted else values


def check_sharing(records_url: SecretStr | None) -> None:
    """Raise what is wrong with the database that limits are to be shared through."""
    if records_url is None or kind_of(records_url.get_secret_value()) != "postgresql":
        raise ValueError(
            "SERVE_LIMITS_SHARED needs a PostgreSQL that all replicas reach (SQLite is one machine's): "
            "set SERVE_RECORDS_URL=postgresql://USER:PASSWORD@HOST/NAME"
        )


def is_origin(text: str) -> bool:
    """Whether a browser could send ``text`` as the origin of a page; ``*`` is any."""
    return text == "*" or re.fullmatch(r"https?://[a-z0-9.\[\]:-]+", text) is not None


def written(value: Any) -> str:
    """A value as a variable of the environment has it, secrets too."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value).lower() if isinstance(value, bool) else str(value)


def variables(settings: BaseSettings, prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """What was set, as variables for a container: the public ones, and the secret ones."""
    public: dict[str, str] = {}
    secret: dict[str, str] = {}
    for name in sorted(settings.model_fields_set):
        value: Any = getattr(settings, name)
        parts = cast("tuple[Any, ...]", value if isinstance(value, tuple) else (value,))
        if value is None or not parts:
            continue
        is_secret = any(isinstance(part, SecretStr) for part in parts)
        (secret if is_secret else public)[prefix + name.upper()] = ",".join(written(part) for part in parts)
    return public, secret


def cache_if_any() -> Path | None:
    """The default folder for what later starts use again; None where there is no home."""
    try:
        return default_cache()
    except RuntimeError:  # containers run as users without a home
        return None


def name_of(model: str) -> str:
    """The name in the API of a model that is given as a folder or an id."""
    folder = Path(model).expanduser()
    # Not resolve(): the name of a link is the operator's choice.
    return Path(os.path.abspath(folder)).name if folder.exists() else model  # noqa: PTH100


def wrong_values(error: ValidationError | ValueError | OSError, settings: type[BaseSettings]) -> ConfigError:
    """What is wrong with each variable of a settings class: its name, its value (secrets left out) and the remedy."""
    if not isinstance(error, ValidationError):  # of the one file that pydantic reads by itself
        return unreadable(Path(".env"), error)
    return ConfigError("\n".join(_wrong_value(problem, settings) for problem in error.errors()))


def unreadable(path: Path, error: ValueError | OSError) -> ConfigError:
    """What is said of a file of settings that cannot be read."""
    why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
    return ConfigError(f"{path.absolute()} cannot be read: {why}")


def _wrong_value(problem: Any, settings: type[BaseSettings]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    variable = name if name.isupper() else settings.model_config.get("env_prefix", "") + name.upper()
    shown = "" if name in secret_names(settings.model_fields) else f"={problem['input']!r}"
    return f"{variable}{shown}: {message}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """Whether ``host`` is an IP address, and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def no_address(value: Any) -> Any:
    """A port as it was given, unless Kubernetes put a Service's address into its variable."""
    if isinstance(value, str) and value.startswith("tcp://"):
        raise ValueError(
            "this is Kubernetes' address of a Service named 'serve', not a port; "
            "rename the Service or set enableServiceLinks: false"
        )
    return value


def only_origins(value: tuple[str, ...]) -> tuple[str, ...]:
    """Origins of web pages, if that is what they all are."""
    for origin in value:
        if not is_origin(origin):
            raise ValueError(f"{origin!r} is no origin: write scheme and host only, such as https://app.example")
    return value
