"""Rules between the fields of one service; each yields the field and what is wrong with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from trimaran.platforms.render.plans import PLANS, REGIONS

Problems = Iterator[tuple[str, str]]
Service = Mapping[str, Any]

SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|PRIVATE_KEY|API_?KEYS?|ACCESS_KEY)(_|$)", re.I)
SECRET_VALUE = re.compile(r"^(hf_\w{16,}|rpa_\w{16,}|rnd_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,})")
FORBIDDEN_MOUNTS = frozenset(
    {"/", "/opt", "/home", "/etc", "/etc/secrets", "/usr", "/var", "/bin", "/lib", "/root", "/proc", "/dev"}
)
DEFAULT_DELAY_S, DEFAULT_DRAIN_S = 30, 25


def mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list, if it is one."""
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [cast("dict[str, Any]", item) for item in items if isinstance(item, dict)]


def service(given: Service, root: Path, groups: set[str]) -> Problems:
    """All problems of one service that concern more than one field's type."""
    for rule in RULES:
        yield from rule(given)
    yield from _files(given, root)
    yield from _health(given)
    yield from _variables(given, groups)


def _plan_and_region(given: Service) -> Problems:
    plan, region = given.get("plan"), given.get("region")
    if isinstance(plan, str) and plan not in PLANS:
        near = difflib.get_close_matches(plan.replace("_", " ").lower(), PLANS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; one of {', '.join(PLANS)}"
        yield "plan", f"there is no plan {plan!r}{hint}"
    if isinstance(region, str) and region not in REGIONS:
        yield "region", f"there is no region {region!r}; one of {', '.join(REGIONS)}"


def _free_plan(given: Service) -> Problems:
    if given.get("plan") != "free":
        return
    if "maxShutdownDelaySeconds" in given:
        yield "maxShutdownDelaySeconds", "the free plan does not allow it; remove it or choose a paid plan"
    if "disk" in given:
        yield "disk", "the free plan has no disks; remove it or choose a paid plan"
    if "scaling" in given or _number(given.get("numInstances"), 1) > 1:
        field = "scaling" if "scaling" in given else "numInstances"
        yield field, "the free plan runs a single instance; remove it or choose a paid plan"


def _disk(given: Service) -> Problems:
    disk = given.get("disk")
    if not isinstance(disk, dict) or given.get("plan") == "free":
        return
    if "scaling" in given:
        yield "scaling", "a service with a disk runs a single instance; remove scaling or the disk"
    elif _number(given.get("numInstances"), 1) > 1:
        yield "numInstances", "a service with a disk runs a single instance; remove it or the disk"
    if "maxShutdownDelaySeconds" in given:
        yield "maxShutdownDelaySeconds", "Render refuses it for services with a disk; remove it or the disk"


def _mount(given: Service) -> Problems:
    disk = given.get("disk")
    path = str(cast("dict[str, Any]", disk).get("mountPath", "")) if isinstance(disk, dict) else ""
    if not path:
        return
    if not path.startswith("/"):
        yield "disk.mountPath", f"must be an absolute path, not {path!r}"
    elif str(PurePosixPath(path)) in FORBIDDEN_MOUNTS:
        yield "disk.mountPath", f"Render forbids {path}; use a folder such as /data"


def _instances(given: Service) -> Problems:
    scaling = given.get("scaling")
    if not isinstance(scaling, dict):
        return
    bounds = cast("dict[str, Any]", scaling)
    if "numInstances" in given and "disk" not in given:
        yield "numInstances", "scaling decides the number of instances; remove one of the two"
    if _number(bounds.get("minInstances"), 1) > _number(bounds.get("maxInstances"), 100):
        yield "scaling.minInstances", "exceeds maxInstances"
    if not {"targetCPUPercent", "targetMemoryPercent"} & bounds.keys():
        yield "scaling", "needs targetCPUPercent or targetMemoryPercent"


def _source(given: Service) -> Problems:
    runtime, image = given.get("runtime"), given.get("image")
    if runtime == "image" and image is None:
        yield "image", "is missing: runtime image needs image.url"
    if runtime == "docker" and image is not None:
        yield "image", "runtime docker builds from the Dockerfile; remove it, or set runtime: image"
    if runtime == "image":
        for field in ("dockerfilePath", "dockerContext", "rootDir", "branch", "buildFilter", "repo"):
            if field in given:
                yield field, "runtime image builds nothing; remove it"


RULES: tuple[Callable[[Service], Problems], ...] = (
    _plan_and_region, _free_plan, _disk, _mount, _instances, _source,
)  # fmt: skip


def _files(given: Service, root: Path) -> Problems:
    if given.get("runtime") != "docker" or "repo" in given:
        return
    base = root / str(given.get("rootDir") or ".")
    path = str(given.get("dockerfilePath") or "./Dockerfile")
    if not (base / path).is_file():
        yield "dockerfilePath", f"{path} does not exist in the repository"
    context = given.get("dockerContext")
    if isinstance(context, str) and not (base / context).is_dir():
        yield "dockerContext", f"{context} is not a folder of the repository"


def _health(given: Service) -> Problems:
    from serve.api.app import create_app  # noqa: PLC0415
    from serve.api.auth import OPEN_PATHS  # noqa: PLC0415
    from serve.settings import EngineName, Settings  # noqa: PLC0415

    path = given.get("healthCheckPath")
    if path is None:
        yield "healthCheckPath", "is missing: Render would only try the port; use /health"
    elif isinstance(path, str) and path not in OPEN_PATHS:
        app = create_app(Settings(engine=EngineName.ECHO, _env_file=None))  # pyright: ignore[reportCallIssue]
        why = "needs a key, which Render does not send" if path in app.openapi()["paths"] else "is no route of the app"
        yield "healthCheckPath", f"{path} {why}; use /health"


def group_variables(group: Service) -> Problems:
    """A group's variables; only ``value`` and ``generateValue`` are allowed there."""
    for index, variable in enumerate(mappings(group.get("envVars"))):
        where = f"envVars[{index}]"
        if not {"value", "generateValue"} & variable.keys():
            yield where, "a group's variable has a value or generateValue: true"
        yield from _secret(variable, where)


def _variables(given: Service, groups: set[str]) -> Problems:
    variables = mappings(given.get("envVars"))
    keys: dict[str, Any] = {}
    for index, variable in enumerate(variables):
        where, key = f"envVars[{index}]", str(variable.get("key", ""))
        if "fromGroup" in variable:
            if variable["fromGroup"] not in groups:
                yield f"{where}.fromGroup", f"this file has no group {variable['fromGroup']!r}"
            continue
        sources = {"value", "generateValue", "sync", "fromService", "fromDatabase"} & variable.keys()
        if not key:
            yield where, "has no key"
        elif key in keys:
            yield where, f"{key} is set twice"
        elif len(sources) != 1:
            yield where, f"{key} needs exactly one of value, generateValue, sync: false, fromService, fromDatabase"
        elif variable.get("sync") is True:
            yield f"{where}.sync", f"{key}: only sync: false means something (asked for once, then kept by Render)"
        else:
            yield from _secret(variable, where)
        keys[key] = variable.get("value", "")
    yield from _settings(keys, given)


def _secret(variable: Service, where: str) -> Problems:
    key, value = str(variable.get("key", "")), str(variable.get("value") or "")
    if value and (SECRET_NAME.search(key) or SECRET_VALUE.match(value)):
        yield f"{where}.value", f"{key} is a secret, and this file is committed; use sync: false or generateValue: true"


def _settings(values: Mapping[str, Any], given: Service) -> Problems:
    """What the container makes of its variables."""
    from serve.settings import unknown_variables  # noqa: PLC0415

    for name in ("PORT", "SERVE_PORT"):
        if name in values:
            yield "envVars", f"{name} is hard-coded; leave it out: Render sets PORT (10000), and the server follows"
    for warning in unknown_variables(dict.fromkeys(values, "")):
        yield "envVars", warning
    if values.get("SERVE_HOST", "0.0.0.0") not in {"0.0.0.0", "::"}:  # noqa: S104 - compared with
        yield "envVars", f"SERVE_HOST={values['SERVE_HOST']} is not reachable for Render; leave it out"
    is_open = str(values.get("SERVE_ALLOW_ANONYMOUS", "")).lower() in {"true", "1", "yes"}
    has_group = any("fromGroup" in variable for variable in mappings(given.get("envVars")))
    if "SERVE_API_KEYS" not in values and not is_open and not has_group:
        yield (
            "envVars",
            "SERVE_API_KEYS is missing: the server refuses a public address without keys (generateValue: true)",
        )
    delay = given.get("maxShutdownDelaySeconds", DEFAULT_DELAY_S)
    drain = _number(values.get("SERVE_DRAIN_TIMEOUT_S"), DEFAULT_DRAIN_S)
    if isinstance(delay, int) and 1 <= delay <= 300 and drain >= delay:
        yield "envVars", f"SERVE_DRAIN_TIMEOUT_S={drain:g} must be shorter than the shutdown delay of {delay} s"


def _number(value: Any, default: float) -> float:
    try:
        return default if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return default
