"""What a deploy would create at Modal, as a tree for people.  Secrets by name only."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from modal_proto import api_pb2 as pb

from trimaran.emulate.modal.control import ControlPlane

Branch = tuple[str, "list[Branch]"]
MAX_CHARS = 110


def tree(plane: ControlPlane) -> str:
    """The app that was deployed last, with everything that its functions name."""
    if plane.published is None:
        raise LookupError("nothing was deployed")
    functions = [_function(plane, plane.functions[key]) for key in plane.published.function_ids.values()]
    lines: list[str] = [f"App {plane.published.name}"]
    _draw(functions, "", lines)
    return "\n".join(lines)


def _draw(branches: list[Branch], indent: str, lines: list[str]) -> None:
    for index, (text, below) in enumerate(branches):
        is_last = index == len(branches) - 1
        shown = text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"
        lines.append(f"{indent}{'└── ' if is_last else '├── '}{shown}")
        _draw(below, indent + ("    " if is_last else "│   "), lines)


def _function(plane: ControlPlane, request: pb.FunctionCreateRequest) -> Branch:
    variants = (
        [request.function]
        if request.HasField("function")
        else [ranked.function for ranked in request.function_data.ranked_functions]
    )
    function = variants[0]
    return (
        f"{'Server' if function.is_server else 'Class'} {function.function_name.removesuffix('.*')}",
        [
            ("Image", _image(plane, function.image_id)),
            ("Mounts (code; a change makes no new image)", _mounts(plane, function)),
            ("Hardware", _hardware(variants)),
            ("Secrets", [(text, []) for text in _secrets(plane, function)]),
            ("Volumes", [(text, []) for text in _volumes(plane, function)]),
            ("Autoscaling", [(text, []) for text in _autoscaling(function)]),
            ("Start", [(text, []) for text in _start(function)]),
            ("Address", [(text, []) for text in _address(function)]),
        ],
    )


def _image(plane: ControlPlane, image_id: str) -> list[Branch]:
    found: list[Branch] = []
    for layer in plane.layers(image_id):
        steps = [command for command in layer.dockerfile_commands if command != "FROM base"]
        if steps:
            found.append((steps[0], [(step, []) for step in steps[1:]]))
        else:
            found.append(("run a function of the app: the weights go to the Volume", []))
    return found


def _mounts(plane: ControlPlane, function: pb.Function) -> list[Branch]:
    names = [PurePosixPath(file.filename) for mount in function.mount_ids for file in plane.mounts.get(mount, [])]
    folders = Counter(str(PurePosixPath(*name.parts[:3])) for name in names)
    return [
        (folder if count == 1 else f"{folder}: {count} files, {_others(names, folder)} of them not Python", [])
        for folder, count in sorted(folders.items())
    ]


def _others(names: list[PurePosixPath], folder: str) -> int:
    return sum(name.suffix != ".py" for name in names if name.is_relative_to(folder))


def _hardware(variants: list[pb.Function]) -> list[Branch]:
    resources = variants[0].resources
    gpus = [variant.resources.gpu_config.gpu_type for variant in variants if variant.resources.gpu_config.count]
    placement = variants[0].scheduler_placement.regions
    return [
        (f"GPU: {', else '.join(gpus) or 'none'}", []),
        (f"{resources.milli_cpu / 1000:g} cores, {resources.memory_mb} MiB", []),
        (f"regions: {', '.join(placement) or 'any'}", []),
    ]


def _secrets(plane: ControlPlane, function: pb.Function) -> list[str]:
    shown: list[str] = []
    for secret_id in function.secret_ids:
        request, names = plane.secrets[secret_id], sorted(plane.variables(secret_id))
        shown.append(f"{request.deployment_name or 'of the app'}: {', '.join(names) or 'empty'}")
    return shown


def _volumes(plane: ControlPlane, function: pb.Function) -> list[str]:
    return [
        f"{plane.volumes[mount.volume_id].deployment_name} at {mount.mount_path}"
        + (", read-only" if mount.read_only else "")
        for mount in function.volume_mounts
    ]


def _autoscaling(function: pb.Function) -> list[str]:
    scaling = function.autoscaler_settings
    target = scaling.target_concurrency_float or function.target_concurrent_inputs
    return [
        f"{scaling.min_containers} to {scaling.max_containers} containers, {scaling.buffer_containers} ahead of demand",
        f"idle containers end after {scaling.scaledown_window} s",
        f"{target:g} requests a container, at most {function.max_concurrent_inputs or 'what the server admits'}",
    ]


def _start(function: pb.Function) -> list[str]:
    is_gpu = function.experimental_options.get("enable_gpu_snapshot", "")
    kind = "none" if not function.checkpointing_enabled else "with GPU memory" if is_gpu else "of CPU memory"
    timeout = function.http_config.startup_timeout if function.is_server else function.startup_timeout_secs
    return [f"memory snapshot: {kind}", f"at most {timeout} s"]


def _address(function: pb.Function) -> list[str]:
    if function.is_server:
        config = function.http_config
        auth = "open to the app's own keys" if config.unauthenticated else "behind Modal's proxy authentication"
        return [f"server on port {config.port}, <workspace>--<app>-<server>.<region>.modal.direct", auth]
    lines: list[str] = []
    for method in function.method_definitions.values():
        hook = method.webhook_config
        auth = "behind Modal's proxy authentication" if hook.requires_proxy_auth else "open to the app's own keys"
        lines += [f"web function, <workspace>--{hook.requested_suffix or '<app>-model-web'}.modal.run", auth]
    return lines
