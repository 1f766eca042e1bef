"""One configuration, told in Render's two languages: a Blueprint file, and bodies of API requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve.errors import ConfigError
from trimaran.platforms.render.plans import PLANS, Plan
from trimaran.platforms.render.rules import SECRET_NAME

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
HEALTH_PATH = "/health"
GENERATED_KEY = "SERVE_API_KEYS"
DRAIN_MARGIN_S = 10
"""Seconds between the end of the drain and Render's SIGKILL."""

HIDDEN = "***"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """What a deploy wants: a prebuilt ``image``, or ``repo`` with a Dockerfile; what it serves; and how large it is.

    ``secrets`` travel by the API only; a Blueprint asks for them once.
    """

    name: str
    plan: str = "standard"
    region: str = "oregon"
    image: str | None = None
    repo: str | None = None
    branch: str | None = None
    shutdown_delay_s: int = 120
    disk_gb: int | None = None
    environment: dict[str, str] = field(default_factory=dict[str, str])
    secrets: dict[str, str] = field(default_factory=dict[str, str], repr=False)

    def size(self) -> Plan:
        """The plan.

        Raises:
            ConfigError: there is no such plan.
        """
        name = self.plan if self.plan in PLANS else self.plan.replace("_", " ")
        if name not in PLANS:
            raise ConfigError(f"Render has no plan {self.plan!r}; one of {', '.join(PLANS)}")
        return PLANS[name]

    @property
    def has_delay(self) -> bool:
        """Whether Render lets this service choose its shutdown delay."""
        return self.disk_gb is None and not self.size().is_free

    def variables(self) -> dict[str, str]:
        """The environment without secrets."""
        variables = dict(self.environment)
        if self.has_delay:
            drain = max(1, self.shutdown_delay_s - DRAIN_MARGIN_S)
            variables.setdefault("SERVE_DRAIN_TIMEOUT_S", str(drain))
        if self.image is None and variables.get("SERVE_ENGINE") != "remote":
            variables.setdefault("TORCH_INDEX_URL", CPU_INDEX)
        return variables


def blueprint(spec: ServiceSpec) -> dict[str, Any]:
    """The content of a ``render.yaml``."""
    service: dict[str, Any] = {"type": "web", "name": spec.name}
    if spec.image is not None:
        service |= {"runtime": "image", "image": {"url": spec.image}}
    else:
        service |= {"runtime": "docker", "dockerfilePath": "./Dockerfile"}
        service |= {key: value for key, value in (("repo", spec.repo), ("branch", spec.branch)) if value}
    service |= {"plan": spec.size().name, "region": spec.region, "healthCheckPath": HEALTH_PATH}
    if spec.has_delay:
        service["maxShutdownDelaySeconds"] = spec.shutdown_delay_s
    if spec.disk_gb is not None:
        service["disk"] = _disk(spec)
    variables: list[dict[str, Any]] = [{"key": key, "value": value} for key, value in spec.variables().items()]
    if GENERATED_KEY not in spec.secrets:
        variables.append({"key": GENERATED_KEY, "generateValue": True})
    variables += [{"key": key, "sync": False} for key in spec.secrets]
    return {"services": [{**service, "envVars": variables}]}


def create_body(spec: ServiceSpec, owner_id: str) -> dict[str, Any]:
    """The body of ``POST /services``."""
    variables: list[dict[str, Any]] = [
        {"key": key, "value": value} for key, value in {**spec.variables(), **spec.secrets}.items()
    ]
    if GENERATED_KEY not in spec.secrets:
        variables.append({"key": GENERATED_KEY, "generateValue": True})
    body = {"type": "web_service", "name": spec.name, "ownerId": owner_id, "autoDeployTrigger": "off"}
    details = {**_details(spec), "runtime": "image" if spec.image else "docker", "region": spec.region}
    if spec.disk_gb is not None:
        details["disk"] = _disk(spec)
    return {**body, **_source(spec, owner_id), "envVars": variables, "serviceDetails": details}


def update_body(spec: ServiceSpec, owner_id: str) -> dict[str, Any]:
    """The body of ``PATCH /services/{id}``; type, runtime, region and disk of a service stay as they are."""
    return {**_source(spec, owner_id), "serviceDetails": _details(spec)}


def _source(spec: ServiceSpec, owner_id: str) -> dict[str, Any]:
    if spec.image is not None:
        return {"image": {"ownerId": owner_id, "imagePath": spec.image}}
    return {key: value for key, value in (("repo", spec.repo), ("branch", spec.branch)) if value}


def _details(spec: ServiceSpec) -> dict[str, Any]:
    details: dict[str, Any] = {"plan": spec.size().api_name, "healthCheckPath": HEALTH_PATH}
    if spec.image is None:
        details["envSpecificDetails"] = {"dockerfilePath": "./Dockerfile", "dockerContext": "."}
    if spec.has_delay:
        details["maxShutdownDelaySeconds"] = spec.shutdown_delay_s
    return details


def _disk(spec: ServiceSpec) -> dict[str, Any]:
    return {"name": "models", "mountPath": "/data", "sizeGB": spec.disk_gb}


def without_secrets(body: dict[str, Any]) -> dict[str, Any]:
    """The same body, fit to be printed."""
    variables = [
        {**variable, "value": HIDDEN} if "value" in variable and SECRET_NAME.search(variable["key"]) else variable
        for variable in body.get("envVars", [])
    ]
    return {**body, "envVars": variables} if variables else body
