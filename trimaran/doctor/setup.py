"""What is wrong around the model: settings, keys, images, time limits, credentials, tools."""

from __future__ import annotations

import ast
import importlib.util
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from serve.errors import ConfigError, ServeError
from serve.settings import EngineName, unknown_variables
from trimaran.doctor.finding import Finding, Findings, Situation
from trimaran.plan.machines import COLD_READ_BYTES_S, COLD_START_S
from trimaran.platforms.render.service import DRAIN_MARGIN_S
from trimaran.platforms.runpod.endpoint import DEFAULTS

KEYS = {"runpod": "RUNPOD_API_KEY", "render": "RENDER_API_KEY"}
MOVING = re.compile(
    r"^\D*$|(^|[-_.])(latest|main|master|nightly|dev|edge|stable|head|snapshot)($|[-_.])", re.IGNORECASE
)
"""A tag without a digit, such as ``cpu``, or with such a word in it, as ``cu128-latest``, is moved by its next push."""

MODAL_GRACE_S, MAX_DELAY_S = 3600, 300
SLOW_BOOT = 3
"""How many times longer than estimated a boot may take before it must not be given up."""


def variables(situation: Situation) -> Findings:
    """Names that nobody reads."""
    for warning in unknown_variables(situation.environ):
        name, _, hint = warning.partition("; ")
        right = hint.removeprefix("did you mean ").rstrip("?")
        mend = f"rename it: {right}" if right else f"unset {name.split()[0]}"
        yield Finding("unknown-variable", name, "It would be ignored, and the default used.", mend)
    table = modal_knobs() if situation.platform == "modal" else {}
    for name in sorted(situation.environ):
        if table and name.startswith("SERVE_MODAL_") and name.removeprefix("SERVE_MODAL_") not in table:
            yield Finding(
                "unknown-variable",
                f"{name} is no knob of the Modal adapter",
                "The deploy would be refused.",
                f"unset {name}; there are: docs/reference/modal.md",
            )


def modal_knobs() -> dict[str, tuple[str, str]]:
    """The adapter's knobs with their defaults, read from its file, which is not run; empty outside a checkout."""
    from trimaran.emulate.modal.session import ADAPTER  # noqa: PLC0415

    if not ADAPTER.is_file():
        return {}
    for node in ast.parse(ADAPTER.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KNOBS":
            return ast.literal_eval(node.value)
    return {}


def keys(situation: Situation) -> Findings:
    """Addresses that anybody could use, and two parties that want the same header."""
    settings, platform = situation.settings, situation.platform
    stored = situation.environ.get("SERVE_MODAL_SECRET")
    if platform == "modal" and not (settings.knows_callers or settings.allow_anonymous or stored):
        yield Finding(
            "no-keys",
            "SERVE_API_KEYS is not set",
            "The deploy would be refused: anybody could use the address, and you would pay.",
            'export SERVE_API_KEYS="sk-$(openssl rand -hex 24)"',
        )
    if platform == "runpod" and situation.mode == "http" and settings.knows_callers:
        yield Finding(
            "authorization-taken",
            "RunPod's edge takes the Authorization header for its own key, and the server wants keys of its own",
            "Clients that send our key as Authorization: Bearer are refused by RunPod before a worker sees them.",
            "send RunPod's key as Authorization and ours as X-API-Key, or: unset SERVE_API_KEYS SERVE_API_KEYS_FILE",
        )


def images(situation: Situation) -> Findings:
    """Tags that move."""
    image = situation.image
    if image is None or "@sha256:" in image:
        return
    _, _, tag = image.rpartition("/")[2].partition(":")
    if not tag or MOVING.search(tag):
        yield Finding(
            "moving-tag",
            f"the image {image} has {'no tag' if not tag else f'the tag {tag!r}, which its next push moves'}",
            "Platforms keep the image that they have: some machines would run the old one, and a rollback the new one.",
            f"name the digest: docker inspect --format '{{{{index .RepoDigests 0}}}}' {image}",
        )


def times(situation: Situation) -> Findings:
    """Limits that end a start or a stream too early."""
    drain, platform = situation.settings.drain_timeout_s, situation.platform
    if platform == "render" and drain > situation.shutdown_delay_s - DRAIN_MARGIN_S and drain != _default_drain():
        yield _drain(drain, f"Render ends the container {situation.shutdown_delay_s} s after SIGTERM", situation)
    if platform == "modal" and drain + 5 > MODAL_GRACE_S:
        yield _drain(drain, f"Modal ends a container at most {MODAL_GRACE_S} s after SIGTERM", situation)
    given = situation.environ.get("SERVE_MODAL_STARTUP_TIMEOUT", "")
    if platform != "modal" or not given.replace(".", "", 1).isdigit():
        return
    stored = situation.need.stored_bytes if situation.need else 0
    wanted = SLOW_BOOT * (COLD_START_S + stored / COLD_READ_BYTES_S)
    if float(given) < wanted:
        yield Finding(
            "startup-too-short",
            f"SERVE_MODAL_STARTUP_TIMEOUT={given}, and a slow boot of this model takes up to {wanted:.0f} s",
            "Modal would end each container before it is ready, and start the next one.",
            "unset SERVE_MODAL_STARTUP_TIMEOUT (default: 1800)",
        )


def _default_drain() -> float:
    from serve.settings import Settings  # noqa: PLC0415

    return Settings.model_fields["drain_timeout_s"].default


def _drain(drain_s: float, limit: str, situation: Situation) -> Finding:
    wanted = math.ceil(drain_s) + DRAIN_MARGIN_S
    mend = situation.as_variable("drain_timeout_s", MODAL_GRACE_S - 5)
    if situation.platform == "render":
        mend = f"trimaran deploy render --shutdown-delay {wanted} ..."
        if wanted > MAX_DELAY_S:
            mend = situation.as_variable("drain_timeout_s", MAX_DELAY_S - DRAIN_MARGIN_S)
            mend += f" and: trimaran deploy render --shutdown-delay {MAX_DELAY_S} ..."
    what = f"SERVE_DRAIN_TIMEOUT_S={drain_s:g}, and {limit}"
    return Finding("drain-cut", what, "Running streams would be cut at every deploy.", mend)


def model_place(situation: Situation) -> Findings:
    """Folders of this machine, which a container elsewhere does not have."""
    model = situation.settings.model
    is_served = situation.settings.engine is EngineName.TRANSFORMERS
    if is_served and situation.platform in {"runpod", "render"} and Path(model).expanduser().exists():
        yield Finding(
            "local-folder",
            f"{model} is a folder of this machine",
            f"{situation.where} starts an image: it has no such folder, and the server ends with 3.",
            f"hf upload owner/name {shlex.quote(model)} --private, and name that; or bake it in:"
            " docker build --build-arg MODEL_ID=owner/name ...",
        )
    yield from _local_files(situation)


def _local_files(situation: Situation) -> Findings:
    """Settings that name files of this machine.  Modal's deploy brings models and templates along, but no keys."""
    settings, platform = situation.settings, situation.platform
    if platform is None:
        return
    named = {"api_keys_file": settings.api_keys_file}
    if platform != "modal":
        named |= {"chat_template": settings.chat_template}
        named |= {"embedding_model": Path(settings.embedding_model) if settings.embedding_model else None}
    for setting, path in named.items():
        if path is not None and _is_here(path.expanduser()):
            variable = f"SERVE_{setting.upper()}"
            yield Finding(
                "local-file",
                f"{variable}={path} is on this machine",
                f"The container at {situation.where} has no such file, and would not start.",
                {
                    "api_keys_file": "export SERVE_API_KEYS=... (the hashes of `trimaran keys new`, by commas)"
                    " and: unset SERVE_API_KEYS_FILE",
                    "embedding_model": "push it to a repository of the Hub: export SERVE_EMBEDDING_MODEL=owner/name",
                }.get(setting, f"put it into the model's repository or the image, or: unset {variable}"),
            )


def _is_here(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # below a folder that may not be entered
        return True


def credentials(situation: Situation) -> Findings:
    """What the deploy needs to be let in."""
    platform = situation.platform or ""
    if (name := KEYS.get(platform)) and not situation.environ.get(name):
        yield Finding("no-credentials", f"{name} is not set", "The deploy could not start.", f"export {name}=...")
    if platform == "modal":
        config = Path(situation.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml").expanduser()
        given = [bool(situation.environ.get(name)) for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET")]
        if not all(given) and not config.is_file():
            half = f"of MODAL_TOKEN_ID and MODAL_TOKEN_SECRET only one is set, and {config}" if any(given) else config
            yield Finding("no-credentials", f"{half} does not exist", "The deploy could not start.", "modal setup")


def tools(situation: Situation) -> Findings:
    """Programs that the deploy calls."""
    if situation.platform == "modal" and importlib.util.find_spec("modal") is None:
        mend = "pip install -e '.[modal]'"
        yield Finding("missing-tool", "the command `modal` is not installed", "The deploy could not start.", mend)
    if situation.platform in KEYS and situation.image is None and situation.blueprint is None:
        builders = ("docker", "podman", "buildah")
        if not any(shutil.which(tool, path=situation.environ.get("PATH")) for tool in builders):
            yield Finding(
                "missing-tool",
                "none of docker, podman and buildah is installed, and no --image is named",
                f"{situation.where} starts an image, and this machine cannot build one.",
                "install Docker, or name an image that was pushed: --image REGISTRY/NAME@sha256:...",
            )


def idle_endpoint(situation: Situation) -> Findings:
    """RunPod lowers the workers of an endpoint that nobody used: to 2 after 3 days, to 0 after 7."""
    key = situation.environ.get("RUNPOD_API_KEY")
    if situation.platform != "runpod" or not key:
        return
    from trimaran.platforms.runpod.api import API, RunpodApi  # noqa: PLC0415

    api = RunpodApi(key, situation.environ.get("RUNPOD_API_URL", API), timeout_s=10)
    try:
        endpoint: dict[str, Any] | None = api.find(situation.name)
    except ConfigError as error:
        yield Finding("no-credentials", error.message, "The deploy could not start.", "export RUNPOD_API_KEY=...")
        return
    except ServeError as error:
        mend = "check the network and https://uptime.runpod.io"
        yield Finding("platform-unreachable", error.message, "The deploy could not start.", mend)
        return
    finally:
        api.close()
    most = (endpoint or {}).get("workers", {}).get("max")
    if isinstance(most, int) and most == 0:
        yield Finding(
            "idle-endpoint",
            f"the endpoint {situation.name} may have 0 workers: RunPod does that after 7 days without a request",
            "Every request waits in the queue for ever; after 3 days it is 2 workers.",
            f"trimaran deploy runpod --name {situation.name} --max {DEFAULTS['workers_max']}",
        )


def blueprint(situation: Situation) -> Findings:
    """Whatever the check of Blueprints knows."""
    if situation.platform != "render" or situation.blueprint is None:
        return
    from trimaran.platforms.render.check import check_blueprint  # noqa: PLC0415

    why = "Render would refuse the file, or the service would not work."
    try:
        text = situation.blueprint.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        mend = "trimaran deploy render --write render.yaml makes one"
        yield Finding("blueprint", f"{situation.blueprint} cannot be read: {reason}", why, mend)
        return
    for found in check_blueprint(text, Path()):
        yield Finding("blueprint", str(found), why, f"trimaran deploy render check {situation.blueprint}")


CHECKS = (
    variables, keys, images, times, model_place, credentials, tools, idle_endpoint, blueprint,
)  # fmt: skip
