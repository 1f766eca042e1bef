"""The part of Render's Blueprint that a web service of ours uses, field by field.

Everything else is refused by name: Render itself rejects unknown fields, but only after the push.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DEPRECATED = {
    "env": "runtime",
    "autoDeploy": "autoDeployTrigger",
    "redis": "keyvalue",
    "previewsEnabled": "previews.generation",
    "pullRequestPreviewsEnabled": "previews.generation",
}
"""Old names, and what replaces them."""

Percent = Annotated[int, Field(ge=1, le=90)]
Count = Annotated[int, Field(ge=1, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Credentials(_Strict):
    """A registry credential that exists in the workspace."""

    fromRegistryCreds: dict[Literal["name"], str]  # noqa: N815 - Render's name


class ImageSource(_Strict):
    """A prebuilt image."""

    url: Annotated[str, Field(min_length=1)]
    creds: Credentials | None = None


class Disk(_Strict):
    """A persistent disk."""

    name: str
    mountPath: str  # noqa: N815
    sizeGB: Annotated[int, Field(ge=1)] = 10  # noqa: N815


class Scaling(_Strict):
    """Autoscaling; needs a Pro workspace."""

    minInstances: Count  # noqa: N815
    maxInstances: Count  # noqa: N815
    targetCPUPercent: Percent | None = None  # noqa: N815
    targetMemoryPercent: Percent | None = None  # noqa: N815


class BuildFilter(_Strict):
    """Which changes build anew."""

    paths: list[str]
    ignoredPaths: list[str]  # noqa: N815


class Previews(_Strict):
    """Preview environments."""

    generation: Literal["off", "manual", "automatic"] | None = None
    plan: str | None = None
    numInstances: Count | None = None  # noqa: N815
    expireAfterDays: Annotated[int, Field(ge=1)] | None = None  # noqa: N815


class EnvVar(_Strict):
    """One variable, or a group of them."""

    key: str | None = None
    value: str | int | float | bool | None = None
    generateValue: bool | None = None  # noqa: N815
    sync: bool | None = None
    fromGroup: str | None = None  # noqa: N815
    fromService: dict[str, Any] | None = None  # noqa: N815
    fromDatabase: dict[str, Any] | None = None  # noqa: N815
    previewValue: str | int | float | bool | None = None  # noqa: N815


class WebService(_Strict):
    """A web service in Docker, built from the repository or taken from a registry."""

    type: Literal["web"]
    name: Annotated[str, Field(min_length=1)]
    runtime: Literal["docker", "image"]
    plan: str = "starter"
    region: str = "oregon"
    branch: str | None = None
    repo: str | None = None
    rootDir: str | None = None  # noqa: N815
    dockerfilePath: str | None = None  # noqa: N815
    dockerContext: str | None = None  # noqa: N815
    dockerCommand: str | None = None  # noqa: N815
    registryCredential: dict[str, Any] | None = None  # noqa: N815
    image: ImageSource | None = None
    preDeployCommand: str | None = None  # noqa: N815
    initialDeployHook: str | None = None  # noqa: N815
    healthCheckPath: str | None = None  # noqa: N815
    maxShutdownDelaySeconds: Annotated[int, Field(ge=1, le=300)] | None = None  # noqa: N815
    autoDeployTrigger: Literal["commit", "checksPass", "off"] | None = None  # noqa: N815
    numInstances: Count | None = None  # noqa: N815
    scaling: Scaling | None = None
    disk: Disk | None = None
    buildFilter: BuildFilter | None = None  # noqa: N815
    domains: list[str] | None = None
    previews: Previews | None = None
    envVars: list[EnvVar] | None = None  # noqa: N815


class Group(_Strict):
    """Variables that several services share."""

    name: str
    envVars: list[EnvVar]  # noqa: N815


class Blueprint(_Strict):
    """The file."""

    services: Annotated[list[dict[str, Any]], Field(min_length=1)]
    envVarGroups: list[Group] | None = None  # noqa: N815
    previews: Previews | None = None
    databases: list[Any] | None = None
    projects: list[Any] | None = None
    version: str | None = None
