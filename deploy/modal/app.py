"""Trimaran on Modal, in one file: the platform's side of ``serve``.

    SERVE_MODEL=Qwen/Qwen3-4B SERVE_MODAL_GPU=L4 SERVE_API_KEYS=... modal deploy deploy/modal/app.py

Imported on your machine, which plans and refuses; in Modal's builder, which has no ``serve``; in each container.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import modal

KNOBS = {  # SERVE_MODAL_<name>: its default, and what it does.  docs/reference/modal.md is made from this.
    "GPU": ("", "GPU such as `L4`, or a list to fall back on: `H100,A100-80GB`. Empty: CPU only."),
    "PRIMITIVE": ("web", "`web` queues requests while no container runs; `server` is leaner, but answers 503 then."),
    "SNAPSHOT": ("auto", "`off`, `cpu`, `gpu` (alpha at Modal); `auto`: `cpu` below 10 GB of weights, else `off`."),
    "MIN_CONTAINERS": ("", "Containers that always run, and cost. Default: 0; 1 for `server`."),
    "MAX_CONTAINERS": ("10", "Most containers at once: the bound of your bill."),
    "BUFFER_CONTAINERS": ("0", "Idle containers that are kept ahead of demand."),
    "SCALEDOWN_WINDOW": ("300", "Seconds that an idle container stays, 2 to 3600."),
    "TARGET_INPUTS": ("", "Requests of a container at which another one starts. Default: the engine's batch size."),
    "MAX_INPUTS": ("", "Most requests of a container. Default: batch size plus `SERVE_MAX_QUEUE`, at most 1000."),
    "MEMORY": ("", "MiB of memory. Default: from the weights' bytes."),
    "CPU": ("", "Cores. Default: from the weights' bytes; 8 without a GPU."),
    "REGION": ("", "Region or regions such as `us-east,eu-west`; costs more. Default: any."),
    "TIMEOUT": ("3600", "Seconds that one request may take (`web`)."),
    "STARTUP_TIMEOUT": ("1800", "Seconds that a container may take to start."),
    "PROXY_AUTH": ("false", "`true`: Modal wakes nothing for requests without `Modal-Key` and `Modal-Secret`."),
    "SECRET": ("", "Name of a secret that is stored at Modal, for instance with `SERVE_API_KEYS` in it."),
    "VOLUME": ("trimaran-models", "Volume for the weights; what starts found out is in another, `<name>-cache`."),
    "LABEL": ("", "Own label in the address of `web`: `<workspace>--<label>.modal.run`."),
    "NAME": ("", "The app's name. Default: from the model's."),
}
PREFIX, MODELS, CACHE, TEMPLATE = "SERVE_MODAL_", "/models", "/cache", "/root/chat_template.jinja"
PORT, GB, UV, WEB_WRITES_PER_S = 8000, 1_000_000_000, "0.9.5", 200  # a write is a call of Modal's relay: 0.5 ms of CPU
ROOT = Path(__file__).resolve().parent.parent.parent


def refuse(reason: str) -> NoReturn:
    """End the deploy; nothing was created."""
    sys.exit(f"Not deployed: {reason}")


def fetch(volume: str, model: str, revision: str | None, names: list[str], target: str, base: str) -> None:
    """In the builder: bring a model's files into the Volume (by id: another is filled anew), complete or not at all."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    final, part = Path(target), Path(target + ".part")
    sys.stdout.write(f"{model} at {revision or 'its default branch'}: {target} in {volume}\n")
    if final.exists():
        return
    snapshot_download(model, revision=revision, allow_patterns=names, local_dir=part)
    shutil.rmtree(part / ".cache", ignore_errors=True)  # what only the download needed
    if base:
        adapter = part / "adapter_config.json"
        adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": base}))
    part.rename(final)


def make_plan() -> SimpleNamespace:
    """Settings, knobs and weights to what is asked of Modal; refuses what would fail later.  Creates nothing."""
    try:
        from serve import knobs, load_settings, observe, placement  # noqa: PLC0415
        from serve.errors import ServeError  # noqa: PLC0415
    except ImportError as error:
        refuse(f"{error}. In the repository's root, run: pip install -e '.[modal]'")
    try:
        knob = knobs.Knobs(PREFIX, KNOBS)
        settings = load_settings(host="127.0.0.1")  # keys are checked here, because Modal may store them
        if not knob.text("SECRET"):
            knobs.check_keys(settings, "modal deploy deploy/modal/app.py")
        observe.configure_logging(settings.log_format, "warning")
        gpus = [gpu.upper() for gpu in knob.names("GPU")]
        plan = scaling(knob, settings, knob.choice("PRIMITIVE", "web", "server"), 64 if gpus else 32)
        plan.placement = placement.place(settings, MODELS, "cuda" if gpus else "cpu")
        check_gpus(gpus, plan.placement)
        plan.snapshot = choose_snapshot(knob, plan.placement, bool(gpus))
        plan.options |= hardware(knob, gpus, plan.placement.num_bytes, plan.snapshot)
        plan.volume, plan.stored_secret = knob.text("VOLUME"), knob.text("SECRET")
        plan.name = knob.text("NAME") or knobs.app_name(settings.served_name)
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,63}", plan.name):
            refuse(f"{PREFIX}NAME={plan.name!r}: at most 63 letters, digits, dots, dashes and underscores")
        public, plan.secrets = plan.placement.environment(settings, TEMPLATE)
        plan.template = settings.chat_template and settings.chat_template.resolve()
    except ServeError as error:
        refuse(error.message)
    plan.environment = {
        "SERVE_THREADS": str(max(1, int(plan.options["cpu"]))),
        **({"SERVE_STREAM_WRITES_PER_S": str(WEB_WRITES_PER_S)} if plan.primitive == "web" else {}),
        **public,
        **knob.given(),
        **{PREFIX + "PRIMITIVE": plan.primitive, PREFIX + "SNAPSHOT": plan.snapshot},
        **{"SERVE_HOST": "0.0.0.0", "SERVE_PORT": str(settings.port or PORT)},  # noqa: S104 - a container has no other address
        **({"SERVE_CACHE_DIR": CACHE} if gpus else {"SERVE_CACHE_DIR": CACHE, "SERVE_DEVICE": "cpu"}),
    }
    size = f"{plan.placement.num_bytes / GB:.2g} GB{'' if plan.placement.is_certain else ' (a guess)'} of weights"
    machine = f"{' or '.join(gpus) or 'no GPU'}, {plan.options['cpu']:g} cores, {plan.options['memory']} MiB"
    sys.stderr.write(f"{settings.served_name}: {size}; {machine}; snapshot {plan.snapshot}\n")
    return plan


def check_gpus(gpus: list[str], placement: Any) -> None:
    """Modal's client takes any name; the cloud would then fail."""
    from serve.cards import MODAL, modal_card  # noqa: PLC0415

    for gpu in gpus:
        if gpu.partition(":")[0] not in MODAL:
            refuse(f"{PREFIX}GPU={gpu} is not a GPU of Modal's; take one of {', '.join(MODAL)}")
        if ":" in gpu:
            refuse(f"{PREFIX}GPU={gpu}: the engine uses one GPU, and you would pay for all; name one without a number")
    needed = placement.num_bytes * 1.1 / GB  # there is no serving without a cache
    if placement.is_certain and (small := [gpu for gpu in gpus if modal_card(gpu).memory_gb < needed]):
        fitting = ", ".join(gpu for gpu in MODAL if modal_card(gpu).memory_gb >= needed) or "none that Modal has"
        refuse(f"{PREFIX}GPU={small[0]} is too small for {placement.num_bytes / GB:.0f} GB of weights; take {fitting}")


def choose_snapshot(knob: Any, placement: Any, has_gpu: bool) -> str:
    """``auto``: where it shortens a start."""
    wanted = knob.choice("SNAPSHOT", "auto", "off", "cpu", "gpu")
    if wanted == "gpu" and not has_gpu:
        refuse(f"{PREFIX}SNAPSHOT=gpu needs {PREFIX}GPU")
    return wanted if wanted != "auto" else "cpu" if placement.gains_from_snapshot else "off"


def hardware(knob: Any, gpus: list[str], num_bytes: int, snapshot: str) -> dict[str, Any]:
    """GPU, memory and cores of a container."""
    from serve.placement import host_cores, host_memory_mib  # noqa: PLC0415

    return {
        "gpu": gpus if len(gpus) > 1 else gpus[0] if gpus else None,
        "memory": knob.count("MEMORY", 512, 344_064) or host_memory_mib(num_bytes, bool(gpus), snapshot != "off"),
        "cpu": knob.number("CPU", 0.125, 64) or host_cores(num_bytes, bool(gpus)),
        "experimental_options": {"enable_gpu_snapshot": True} if snapshot == "gpu" else None,
    }


def scaling(knob: Any, settings: Any, primitive: str, batch: int) -> SimpleNamespace:
    """The start of a plan: how many containers, how many requests in each, where, how long, and at which address."""
    least = knob.count("MIN_CONTAINERS", 0, 1000, int(primitive == "server"))
    most = knob.count("MAX_CONTAINERS", 1, 1000)
    if least > most:
        refuse(f"{PREFIX}MIN_CONTAINERS={least} exceeds {PREFIX}MAX_CONTAINERS={most}")
    if primitive == "server" and not least:
        refuse(f"{PREFIX}PRIMITIVE=server answers 503 without a container: set {PREFIX}MIN_CONTAINERS=1, or take web")
    batch, limit = settings.max_batch_size or batch, knob.count("MAX_INPUTS", 1, 1000)
    target = knob.count("TARGET_INPUTS", 1, 1000) or min(batch, limit or 1000)
    limit = limit or max(target, min(batch + settings.max_queue, 1000))
    if target > limit:
        refuse(f"{PREFIX}TARGET_INPUTS={target} exceeds {PREFIX}MAX_INPUTS={limit}")
    label, is_private = knob.text("LABEL") or None, knob.choice("PROXY_AUTH", "true", "false") == "true"
    if label and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", label):
        refuse(f"{PREFIX}LABEL={label!r}: at most 63 small letters, digits and dashes")
    options = {
        "min_containers": least,
        "max_containers": most,
        "buffer_containers": knob.count("BUFFER_CONTAINERS", 0, 1000),
        "scaledown_window": knob.count("SCALEDOWN_WINDOW", 2, 3600),
        "startup_timeout": knob.count("STARTUP_TIMEOUT", 1, 86_400),
        "region" if primitive == "web" else "compute_region": knob.names("REGION") or None,
    }
    grace = {"exit_grace_period": min(3600, int(settings.drain_timeout_s) + 5)}
    return SimpleNamespace(
        primitive=primitive,
        options=options,
        timeout=knob.count("TIMEOUT", 1, 86_400),
        concurrent={"max_inputs": limit, "target_inputs": target},
        address={"label": label, "requires_proxy_auth": is_private},
        server={"max_concurrency": limit, "target_concurrency": target, "unauthenticated": not is_private} | grace,
    )


def upload(part: Any, volume: str) -> None:
    """Put a local model into the Volume with Modal's own command and its progress bar; what is there is not sent."""
    from serve.placement import staged  # noqa: PLC0415

    chosen = {"MODAL_ENVIRONMENT": modal.config.config.get("environment") or "", "MODAL_PROFILE": modal.config._profile}
    with staged(part) as folder:
        put = ["volume", "put", "--force", volume, str(folder), part.target.removeprefix(MODELS)]
        if subprocess.run([sys.executable, "-m", "modal", *put], env=os.environ | chosen).returncode:  # noqa: S603
            refuse(f"{part.folder} could not be uploaded to the Volume {volume}; Modal's message is above")


def build_image(plan: SimpleNamespace, volume: modal.Volume, secret: modal.Secret) -> modal.Image:
    """Pinned packages first, torch in a layer of its own; weights go to the Volume; code comes last, as a mount."""
    locks = [(ROOT / name).read_text() for name in ("requirements.lock", "requirements-dev.lock")]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", "".join(locks), re.MULTILINE))
    # PyPI's torch is built for CUDA 13, which Modal's driver (580) runs; the other index has the one without CUDA.
    index = None if plan.options["gpu"] else "https://download.pytorch.org/whl/cpu"
    more = [name + ("==" + pins[name] if name in pins else "") for name in plan.placement.packages]
    image = (
        modal.Image.debian_slim(python_version="3.12")
        .uv_pip_install(f"torch=={pins['torch']}", index_url=index, uv_version=UV)
        .uv_pip_install(*more, requirements=[str(ROOT / "requirements.lock")], uv_version=UV)
        .env({"HF_XET_HIGH_PERFORMANCE": "1", "PYTHONUNBUFFERED": "1"})
    )
    try:
        volume.hydrate()  # the first thing that is created
    except modal.exception.AuthError as error:
        refuse(f"{error}")
    for part in plan.placement.parts:
        if part.folder is not None:
            upload(part, plan.volume)
            continue
        args = (volume.object_id, part.model, part.revision, list(part.names), part.target, part.base)
        machine: dict[str, Any] = {"volumes": {MODELS: volume}, "cpu": 4.0, "memory": 8192, "timeout": 7200}
        image = image.run_function(fetch, args=args, secrets=[secret], **machine)
    image = image.add_local_dir(ROOT / "serve", "/root/serve", ignore=["**/__pycache__", "**/*.pyc"])
    return image.add_local_file(plan.template, TEMPLATE) if plan.template else image


IN_CONTAINER = {  # Modal goes by what was deployed; only the number of objects must be the same here
    "primitive": os.environ.get(PREFIX + "PRIMITIVE", "web"),
    "snapshot": os.environ.get(PREFIX + "SNAPSHOT", "off"),
    "stored_secret": os.environ.get(PREFIX + "SECRET", ""),
    **{"name": "trimaran", "volume": "any", "secrets": {}, "environment": {"SERVE_PORT": str(PORT)}, "options": {}},
    **{"timeout": 3600, "concurrent": {"max_inputs": 1}, "address": {}, "server": {}},
}
PLAN = make_plan() if modal.is_local() else SimpleNamespace(**IN_CONTAINER)
VOLUME, CACHED = (modal.Volume.from_name(PLAN.volume + end, create_if_missing=True) for end in ("", "-cache"))
SECRET = modal.Secret.from_dict(PLAN.secrets)
OPTIONS: dict[str, Any] = {
    "image": build_image(PLAN, VOLUME, SECRET) if modal.is_local() else modal.Image.debian_slim(),
    "env": PLAN.environment,
    "secrets": [SECRET] + ([modal.Secret.from_name(PLAN.stored_secret)] if PLAN.stored_secret else []),
    "volumes": {MODELS: VOLUME.with_mount_options(read_only=True), CACHE: CACHED},
    "enable_memory_snapshot": PLAN.snapshot != "off",
    **PLAN.options,
}
app = modal.App(PLAN.name)


class Life:
    """The model's two stages around a snapshot; without one, ``restored`` loads straight onto the device."""

    @modal.enter(snap=PLAN.snapshot != "off")
    def prepare(self) -> None:
        """Before the snapshot: no GPU (but with ``gpu``), no open file of the model, no thread."""
        from serve import create_lifecycle, load_settings  # noqa: PLC0415
        from serve.observe import configure_logging  # noqa: PLC0415

        settings = load_settings()
        configure_logging(settings.log_format, settings.log_level)
        self.lifecycle = create_lifecycle(settings)
        if PLAN.snapshot != "off":
            self.lifecycle.prepare()
        if PLAN.snapshot == "gpu":
            self.lifecycle.restored(settings)

    @modal.enter()
    def restored(self) -> None:
        """After it: device, weights, settings and keys of now.  Requests come when this has returned."""
        from serve import create_app, load_settings  # noqa: PLC0415

        self.settings = load_settings()
        self.lifecycle.restored(self.settings)
        self.asgi = create_app(self.settings, lifecycle=self.lifecycle)
        # Two seconds for the last answers, then Modal replaces the container.
        self.lifecycle.on_failure(lambda _: threading.Timer(2.0, os._exit, [70]).start())


if PLAN.primitive == "web":

    @app.cls(timeout=PLAN.timeout, **OPTIONS)
    @modal.concurrent(**PLAN.concurrent)
    class Model(Life):  # pyright: ignore[reportRedeclaration]
        """Modal holds requests until a container is ready, and drains the app when it ends one."""

        @modal.asgi_app(**PLAN.address)
        def web(self) -> Any:
            """The app."""
            return self.asgi

else:

    @app.server(port=int(PLAN.environment["SERVE_PORT"]), **PLAN.server, **OPTIONS)
    class Model(Life):
        """Modal speaks HTTP with the port."""

        @modal.enter()
        def start(self) -> None:
            """Open the port, now that the model is ready."""
            from serve.server import BackgroundServer  # noqa: PLC0415

            self.server = BackgroundServer(self.asgi, self.settings)
            self.server.start()

        @modal.exit()
        def drain(self) -> None:
            """Let running requests finish."""
            self.server.drain()
