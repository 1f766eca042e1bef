"""What Render would make of one service of a Blueprint: plan, port, health path, patience, disk and environment."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from serve.errors import ConfigError
from trimaran.platforms.render.plans import PLANS, Plan
from trimaran.platforms.render.rules import DEFAULT_DELAY_S

DATA = "/data"
"""Where the image keeps what it downloads."""

PASSED = ("PATH", "LANG", "LC_ALL", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY",
          "HF_ENDPOINT", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")  # fmt: skip
"""Variables of this machine without which the server may not run here; nothing else of it is seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One service.  ``keeps_data`` says whether a disk is mounted where the image downloads to."""

    name: str
    plan: Plan
    port: int
    health_path: str | None
    delay_s: int
    keeps_data: bool
    variables: Mapping[str, str]

    @property
    def key(self) -> str:
        """A key that the server accepts; empty: it wants none."""
        return self.variables.get("SERVE_API_KEYS", "").partition(",")[0].strip()

    def environment(self, disk: Path) -> dict[str, str]:
        """Everything that the server sees; ``disk`` stands for the container's own file system."""
        data, home = disk / DATA.strip("/"), disk / "home"
        image = {
            "HOME": str(home),
            "HF_HOME": str(data / "hf"),
            "XDG_CACHE_HOME": str(data / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONUNBUFFERED": "1",
            "SERVE_HOST": "127.0.0.1",  # in the image 0.0.0.0; nobody else has to reach this one
        }
        render = {
            "PORT": str(self.port),
            "RENDER": "true",
            "RENDER_SERVICE_TYPE": "web",
            "RENDER_SERVICE_NAME": self.name,
        }
        passed = {name: os.environ[name] for name in PASSED if name in os.environ}
        return {**passed, **image, **render, **self.variables}


def read_scene(text: str, *, name: str | None, plan: str | None, port: int, changes: Mapping[str, str]) -> Scene:
    """The scene of a Blueprint's service.

    Args:
        text: The Blueprint.
        name: The service; None is the first web service.
        plan: In place of the Blueprint's.
        port: What Render's 10000 is here.
        changes: Variables in place of the Blueprint's, or beside them.

    Raises:
        ConfigError: there is no such service or plan.
    """
    service = _service(text, name)
    wanted = (plan or str(service.get("plan") or "starter")).replace("_", " ")
    if wanted not in PLANS:
        raise ConfigError(f"Render has no plan {wanted!r}; one of {', '.join(PLANS)}")
    disk = cast("dict[str, Any]", service.get("disk") or {})
    mount = str(disk.get("mountPath", ""))
    variables = {**_variables(service), **changes}
    if variables.get("SERVE_ENGINE") == "echo":
        variables.pop("SERVE_MODEL", None)
    return Scene(
        name=str(service.get("name")),
        plan=PLANS[wanted],
        port=port,
        health_path=service.get("healthCheckPath"),
        delay_s=int(service.get("maxShutdownDelaySeconds") or DEFAULT_DELAY_S),
        keeps_data=bool(mount) and (mount == DATA or mount.startswith(DATA + "/")),
        variables=variables,
    )


def _service(text: str, name: str | None) -> dict[str, Any]:
    try:
        document: Any = yaml.safe_load(text)
        services = cast("list[dict[str, Any]]", document["services"])
        web = [service for service in services if service.get("type") == "web"]
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        raise ConfigError("the Blueprint has no services; see: trimaran deploy render check") from None
    for service in web:
        if name is None or service.get("name") == name:
            return service
    names = ", ".join(str(service.get("name")) for service in web) or "none"
    raise ConfigError(f"the Blueprint has no web service {name or ''}; it has: {names}")


def _variables(service: Mapping[str, Any]) -> dict[str, str]:
    """Values as they are; generated ones made up; asked-for ones from this machine, left out where it has none."""
    found: dict[str, str] = {}
    for variable in cast("list[dict[str, Any]]", service.get("envVars") or []):
        key = str(variable.get("key", ""))
        if variable.get("generateValue"):
            found[key] = secrets.token_hex(16)
        elif variable.get("value") is not None:
            found[key] = str(variable["value"])
        elif variable.get("sync") is False and os.environ.get(key):
            found[key] = os.environ[key]
    return found
