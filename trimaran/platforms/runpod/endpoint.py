"""An endpoint as we want it, and the bodies that say so in RunPod's REST API v2.  Calls nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.errors import ConfigError

TORCH_CUDA = "13.0"
"""What the torch wheel of the default image was built for; workers with an older driver could not run it."""

HTTP_PORT = 8000
IMAGE_GB = 15
"""The image unpacked, with torch and its CUDA libraries."""

INIT_TIMEOUT_S = 1800
"""RunPod gives a worker up that initialises for more than 7 minutes, unless told otherwise."""

DEFAULTS: dict[str, Any] = {
    "pools": ("AMPERE_24", "ADA_24"),
    "gpu_count": 1,
    "min_cuda": TORCH_CUDA,
    "workers_min": 0,
    "workers_max": 3,
    "idle_s": 10,
    "disk_gb": 40,
    "timeout_s": 600,
    "flashboot": True,
}
"""Of a new endpoint.  An update changes only what it is told."""

FLASHBOOT_SUFFIX = " -fb"
"""RunPod appends this to the names of some endpoints."""

Json = dict[str, Any]


def disk_for(weights_gb: float) -> int:
    """Gigabytes of a disk with room for the image and the weights."""
    return round(IMAGE_GB + 1.2 * weights_gb + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSpec:
    """What was asked for; None means: as it is, or the default of a new endpoint.

    ``secrets`` maps variables to the names of RunPod secrets; their values are never seen here.
    """

    name: str
    mode: str = "queue"
    image: str | None = None
    model: str | None = None
    pools: tuple[str, ...] | None = None
    excluded: tuple[str, ...] | None = None
    gpu_count: int | None = None
    min_cuda: str | None = None
    workers_min: int | None = None
    workers_max: int | None = None
    idle_s: int | None = None
    disk_gb: int | None = None
    timeout_s: int | None = None
    flashboot: bool | None = None
    registry: str | None = None
    volumes: tuple[str, ...] | None = None
    data_centers: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    secrets: Mapping[str, str] = field(default_factory=dict[str, str])
    unset: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        """RunPod's word for the mode."""
        return "QUEUE" if self.mode == "queue" else "LOAD_BALANCER"

    def with_defaults(self) -> Json:
        """Every setting by name, defaults filled in."""
        given = {name: getattr(self, name) for name in DEFAULTS}
        return {name: DEFAULTS[name] if value is None else value for name, value in given.items()}


def variables(spec: EndpointSpec) -> dict[str, str]:
    """The environment that the deploy itself sets; the mode is always explicit."""
    ours = {"SERVE_RUNPOD_MODE": spec.mode}
    if spec.model:
        ours["SERVE_MODEL"] = spec.model
    if spec.mode == "http":
        port = str(HTTP_PORT)
        ours |= {"SERVE_HOST": "0.0.0.0", "PORT": port, "PORT_HEALTH": port, "HEALTH_CHECK_PATH": "/ping"}  # noqa: S104
    secrets = {name: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for name, secret in spec.secrets.items()}
    return {**ours, **secrets, **spec.environment}


def is_open(environment: Mapping[str, str]) -> bool:
    """Whether the server behind RunPod's own key asks for none of its own."""
    return not environment.get("SERVE_API_KEYS")


def create_body(spec: EndpointSpec) -> Json:
    """The body of ``POST /v2/serverless``.

    Raises:
        ConfigError: something is missing.
    """
    if not spec.image:
        raise ConfigError("name the image that you pushed: --image REGISTRY/NAME:TAG (built with --target runpod)")
    environment = {"RUNPOD_INIT_TIMEOUT": str(INIT_TIMEOUT_S), **variables(spec)}
    if not (environment.get("SERVE_MODEL") or environment.get("SERVE_ENGINE")):
        raise ConfigError("name a model: --model owner/name or a path in the image (or --env SERVE_ENGINE=echo)")
    if spec.mode == "http" and is_open(environment):
        environment["SERVE_ALLOW_ANONYMOUS"] = "true"
    wanted = spec.with_defaults()
    body: Json = {
        "name": spec.name,
        "type": spec.type,
        "image": spec.image,
        "env": environment,
        "disk": wanted["disk_gb"],
        "gpu": _gpu(spec, wanted["pools"], wanted["gpu_count"], wanted["min_cuda"]),
        "workers": {"min": wanted["workers_min"], "max": wanted["workers_max"], "idleTimeout": wanted["idle_s"]},
        "scaling": scaling(spec.mode),
        "timeout": 1000 * wanted["timeout_s"],
        "flashboot": "FLASHBOOT" if wanted["flashboot"] else "OFF",
        **_placement(spec),
    }
    if spec.mode == "http":
        body["ports"] = [f"{HTTP_PORT}/http"]
    return body


def update_body(spec: EndpointSpec, current: Json) -> Json:
    """The body of ``PATCH /v2/serverless/{id}``: what was asked for, and the whole merged environment.

    Raises:
        ConfigError: the endpoint is of the other type, which cannot be changed.
    """
    if current.get("type") not in {None, spec.type}:
        other = "queue" if current["type"] == "QUEUE" else "http"
        raise ConfigError(
            f"{spec.name} is an endpoint of mode {other}, and RunPod cannot change that: deploy with --mode {other}, "
            f"choose another --name, or delete it first"
        )
    kept: dict[str, str] = current.get("env") or {}
    environment = {**kept, **variables(spec)}
    for name in spec.unset:
        environment.pop(name, None)
    if spec.mode == "http" and is_open(environment):
        environment["SERVE_ALLOW_ANONYMOUS"] = "true"
    body: Json = {"env": environment, **_placement(spec)}
    if spec.image:
        body["image"] = spec.image
    if spec.disk_gb is not None:
        body["disk"] = spec.disk_gb
    if spec.timeout_s is not None:
        body["timeout"] = 1000 * spec.timeout_s
    if spec.flashboot is not None:
        body["flashboot"] = "FLASHBOOT" if spec.flashboot else "OFF"
    workers = {"min": spec.workers_min, "max": spec.workers_max, "idleTimeout": spec.idle_s}
    if given := {name: value for name, value in workers.items() if value is not None}:
        body["workers"] = given
    if gpu := _changed_gpu(spec, current.get("gpu") or {}):
        body["gpu"] = gpu
    return body


def scaling(mode: str) -> Json:
    """Queues scale on the wait for a worker, load balancers can only scale on requests in flight."""
    if mode == "queue":
        return {"type": "QUEUE_DELAY", "queueDelay": 4}
    return {"type": "REQUEST_COUNT", "requestCount": 4}


def image_before(releases: list[Json], current: str, version: int | None = None) -> str:
    """The image of an earlier release: of ``version``, or the last one that was another than ``current``.

    Raises:
        ConfigError: no release says so.
    """
    image, newest_first = current, releases
    for release in newest_first:
        if version is not None and release.get("version") == version:
            return image
        changes: list[Json] = release.get("diff") or []
        for change in changes:
            if change.get("field") in {"template.imageName", "image", "imageName"} and isinstance(change["old"], str):
                image = change["old"]
        if version is None and image != current:
            return image
    known = ", ".join(str(release["version"]) for release in releases if release.get("version") is not None)
    raise ConfigError(
        f"no release of version {version}; there are: {known}" if version else "no release had another image"
    )


CONFIGURED = (
    *("name", "type", "image", "env", "disk", "gpu", "workers", "scaling", "timeout", "flashboot", "ports"),
    *("registry", "networkVolumes", "dataCenterIds"),
)


def configuration(endpoint: Json) -> Json:
    """The part of an endpoint that a deploy decides."""
    return {name: endpoint[name] for name in CONFIGURED if endpoint.get(name) not in (None, [], {})}


def address(endpoint: Json) -> str:
    """Where the endpoint's OpenAI API is reached, as well as RunPod tells."""
    urls: dict[str, str] = endpoint.get("requestUrls") or {}
    if "base" in urls:
        return f"{urls['base']}/v1"
    return urls["run"].removesuffix("/run") + "/openai/v1" if "run" in urls else str(endpoint["id"])


def without_values(body: Json) -> Json:
    """The body for a screen: of variables that may be secret only the names."""
    environment: dict[str, str] = body.get("env") or {}
    shown = {name: value if _is_harmless(name, value) else "..." for name, value in environment.items()}
    return {**body, "env": shown} if "env" in body else body


def _is_harmless(name: str, value: str) -> bool:
    return value.startswith("{{ RUNPOD_SECRET_") or not any(word in name for word in ("KEY", "TOKEN", "SECRET", "PASS"))


def _gpu(spec: EndpointSpec, pools: tuple[str, ...], count: int, min_cuda: str) -> Json:
    gpu: Json = {"pools": list(pools), "count": count}
    if min_cuda:
        gpu["minCudaVersion"] = min_cuda
    if spec.excluded:
        gpu["excludedTypes"] = list(spec.excluded)
    return gpu


def _changed_gpu(spec: EndpointSpec, current: Json) -> Json:
    gpu: Json = {}
    pools = list(spec.pools) if spec.pools else current.get("pools")
    if spec.pools or spec.excluded is not None:
        gpu["pools"] = pools
        # Pools without exclusions would clear them.
        kept: Any = current.get("excludedTypes") if sorted(pools or []) == sorted(current.get("pools") or []) else []
        excluded = list(spec.excluded) if spec.excluded is not None else kept
        if excluded:
            gpu["excludedTypes"] = excluded
    if spec.gpu_count is not None:
        gpu["count"] = spec.gpu_count
    if spec.min_cuda is not None:
        gpu["minCudaVersion"] = spec.min_cuda
    return gpu


def _placement(spec: EndpointSpec) -> Json:
    placement: Json = {}
    if spec.registry is not None:
        placement["registry"] = spec.registry
    if spec.volumes is not None:
        placement["networkVolumes"] = list(spec.volumes)
    if spec.data_centers is not None:
        placement["dataCenterIds"] = list(spec.data_centers)
    return placement
