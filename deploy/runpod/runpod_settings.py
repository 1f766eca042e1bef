"""The adapter's own knobs: ``SERVE_RUNPOD_*``, beside the container's ``SERVE_*``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from serve.errors import ConfigError
from serve.setting_values import wrong_values

PREFIX = "SERVE_RUNPOD_"


class Mode(StrEnum):
    """How requests reach the worker."""

    AUTO = "auto"
    QUEUE = "queue"
    HTTP = "http"


class RunpodSettings(BaseSettings):
    """What only a RunPod worker needs to know."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    mode: Mode = Field(
        default=Mode.AUTO,
        description="queue (jobs), http (load balancing), or auto: queue where RunPod gives the worker one, else http.",
    )
    volume: Path = Field(
        default=Path("/runpod-volume"), description="Where RunPod mounts its model cache or a network volume."
    )
    delivery_timeout_s: float = Field(
        default=120.0,
        gt=0,
        le=3600,
        description="Seconds for which an answer that RunPod does not accept is sent again.",
    )

    def resolved_mode(self, environ: Mapping[str, str] = os.environ) -> Mode:
        """The mode without ``auto``.

        Raises:
            ConfigError: ``queue`` was asked for where there is no queue.
        """
        has_queue = bool(environ.get("RUNPOD_WEBHOOK_GET_JOB"))
        if self.mode is Mode.QUEUE and not has_queue:
            raise ConfigError(
                "SERVE_RUNPOD_MODE=queue, but RUNPOD_WEBHOOK_GET_JOB is not set: RunPod sets it on the workers of "
                "queue endpoints; on your own machine start the worker with `trimaran emulate runpod`, or set "
                "SERVE_RUNPOD_MODE=http"
            )
        if self.mode is Mode.AUTO:
            return Mode.QUEUE if has_queue else Mode.HTTP
        return self.mode


def load_runpod_settings(environ: Mapping[str, str] = os.environ) -> RunpodSettings:
    """Read the environment.

    Raises:
        ConfigError: names every wrong value, or every name that is no knob (nobody but the operator sets this prefix).
    """
    known = {PREFIX + name.upper() for name in RunpodSettings.model_fields}
    if unknown := sorted(name for name in environ if name.startswith(PREFIX) and name not in known):
        is_not = "is not a setting" if len(unknown) == 1 else "are not settings"
        raise ConfigError(f"{', '.join(unknown)} {is_not}; there are: {', '.join(sorted(known))}")
    try:
        return RunpodSettings()
    except ValidationError as error:
        raise wrong_values(error, RunpodSettings) from None
