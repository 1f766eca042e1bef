"""Which torch would be installed, here and in an image, and what its CUDA asks of driver, card and platform.

Also whether our own kernels are compiled, where this machine's CPU would compute with them.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from serve import kernels
from serve.setting_values import Device, Dtype, EngineName
from trimaran.doctor.finding import Finding, Findings, Situation
from trimaran.doctor.hardware import cards
from trimaran.platforms.runpod.endpoint import TORCH_CUDA

ARGUMENT = "TORCH_INDEX_URL"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BLACKWELL, BLACKWELL_CUDA = (10, 0), (12, 8)
SMI_TIMEOUT_S = 20
CUDA_BASES = re.compile(r"^FROM\s+\S*(nvidia/cuda|pytorch/pytorch|nvcr\.io)", re.MULTILINE | re.IGNORECASE)
PACKAGE = re.compile(r"^(torch|nvidia-[\w-]+|triton)\b", re.IGNORECASE)


def here(situation: Situation) -> Findings:
    """This machine's driver and torch, when the model is to be served here."""
    built = _installed_cuda()
    if situation.platform is not None or built is None or situation.settings.device is Device.CPU:
        return
    found = _driver_cuda(situation)
    if found is None:  # no GPU that the driver reaches; the server then takes the CPU, and says so
        return
    if not built:
        yield Finding(
            "torch-without-cuda",
            "this machine has an NVIDIA GPU, and the torch that is installed is built without CUDA",
            "The model would be served on the CPU, many times slower.",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu"
            f"{TORCH_CUDA.replace('.', '')}, or accept it: export SERVE_DEVICE=cpu",
        )
    elif int(found[1]) < int(built.partition(".")[0]):  # minor versions of one major run on each other's drivers
        yield Finding(
            "driver-too-old",
            f"this machine's driver runs CUDA {found[1]}.{found[2]}, and torch is built for CUDA {built}",
            "torch would find no GPU, and the server would end with status 3.",
            "update the NVIDIA driver, or: pip install --force-reinstall torch --index-url"
            f" https://download.pytorch.org/whl/cu{found[1]}{found[2]}",
        )


def _driver_cuda(situation: Situation) -> re.Match[str] | None:
    """Major and minor version that this machine's driver runs; None without a GPU that it reaches."""
    smi = shutil.which("nvidia-smi", path=situation.environ.get("PATH"))
    if smi is None:
        return None
    try:
        said = subprocess.run([smi], capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return re.search(r"CUDA Version:\s*(\d+)\.(\d+)", said)


def uncompiled(situation: Situation) -> Findings:
    """Kernels that this machine's CPU could use, when the model is to be served on it in bfloat16."""
    settings = situation.settings
    if situation.platform is not None or settings.engine is not EngineName.TRANSFORMERS or _installed_cuda() is None:
        return
    if settings.device is Device.CUDA or settings.dtype not in {Dtype.AUTO, Dtype.BFLOAT16}:
        return
    if not kernels.are_left_out():
        return
    if settings.device is Device.CPU or _driver_cuda(situation) is None:
        yield Finding(
            "kernels-not-compiled",
            "this CPU has AVX-512 BF16, and the engine's kernels for it are not compiled",
            "Nothing fails: the server computes with torch's kernels, which take more of the CPU's time.",
            "python -m serve.kernels, once, where there is a C compiler",
        )


def _installed_cuda() -> str | None:
    """Of the installed torch, which is not imported: ``13.0``; empty without CUDA; None when there is no torch."""
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if version is None or not version.is_file():
        return None
    found = re.search(r"^cuda[^=]*=\s*['\"]([\d.]+)['\"]", version.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def image_cuda(situation: Situation) -> str | None:
    """What the image's torch is built for, such as ``13.0``; empty without CUDA, None where it names no version."""
    index = situation.torch_index if situation.torch_index is not None else _default_index(Path("Dockerfile"))
    return _cuda_of(index or "")


def _cuda_of(index: str) -> str | None:
    """Of a wheel index; without one the wheels are PyPI's."""
    if not index:
        return TORCH_CUDA
    found = re.search(r"/cu(\d+)(\d)/?$", index)
    return f"{found[1]}.{found[2]}" if found else "" if re.search(r"/cpu/?$", index) else None


def _default_index(dockerfile: Path) -> str | None:
    """The build argument's default in a Dockerfile; None without such an argument."""
    try:
        found = re.search(rf"^ARG {ARGUMENT}=?(.*)$", dockerfile.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return found[1].strip().strip("\"'") if found else None


def combination(situation: Situation) -> Findings:
    """An image whose torch does nothing with the platform's cards."""
    built = image_cuda(situation) if situation.platform == "runpod" else None
    if built is None:
        return
    for name, card in cards(situation):
        if built and card.capability >= BLACKWELL and _numbers(built) < BLACKWELL_CUDA:
            why = f"a torch for CUDA {built} has no kernels for {name} (compute capability {card.capability[0]}.x)"
            yield _rebuild(why, f"https://download.pytorch.org/whl/cu{TORCH_CUDA.replace('.', '')}")
        elif not built:
            yield _rebuild(f"the image's torch is built without CUDA, and {name} is a GPU", "")
            return


def driver(situation: Situation) -> Findings:
    """A driver at RunPod that may be older than the CUDA of the image's torch."""
    lowest, built = situation.min_cuda, image_cuda(situation)
    if situation.platform == "runpod" and lowest and built and _numbers(lowest) < _numbers(built):
        yield Finding(
            "driver-too-old",
            f"workers may have a driver for CUDA {lowest}, and the image's torch is built for CUDA {built}",
            "On such a worker torch finds no GPU, and the server ends with status 3.",
            f"trimaran deploy runpod --min-cuda {built} ..., or build the image with another {ARGUMENT}"
            " and name it: --torch-index URL",
        )


def _rebuild(what: str, index: str) -> Finding:
    return Finding(
        "torch-unfit-for-gpu",
        what,
        "The GPU would be paid for and not be used: the server ends with status 3, or serves on the CPU.",
        f"docker build --build-arg {ARGUMENT}={index} ...",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def cuda_wheels(situation: Situation) -> Findings:
    """Gigabytes of CUDA's libraries in an image for Render, which has no GPUs."""
    if situation.platform != "render":
        return
    for where, why in _for_render(situation):
        yield Finding(
            "cuda-wheels",
            f"{where} {why}",
            "Render has no GPU: the image would be several GB larger than it need be, slow to build and slow to start.",
            f"take {ARGUMENT}={CPU_INDEX}: docker build --build-arg {ARGUMENT}={CPU_INDEX} ...,"
            " or an envVars entry of the Blueprint",
        )


def _for_render(situation: Situation) -> Iterator[tuple[str, str]]:
    """Where CUDA's wheels would come from, and why."""
    if situation.blueprint is None:
        if situation.torch_index is not None:
            if _cuda_of(situation.torch_index) != "":
                yield f"--torch-index {situation.torch_index or '(empty)'}", "brings torch with CUDA"
        elif situation.image is None:
            yield from _of_dockerfile(Path("Dockerfile"), {})
        return
    for service in _services(situation.blueprint):
        runtime = service.get("runtime") or service.get("env")
        if runtime == "docker":
            yield from _of_dockerfile(Path(str(service.get("dockerfilePath") or "Dockerfile")), _values(service))
        elif runtime == "python":
            yield from _of_commands(str(service.get("buildCommand") or ""), Path(), "the buildCommand")


def _services(blueprint: Path) -> list[dict[str, Any]]:
    try:
        document: Any = yaml.safe_load(blueprint.read_text(encoding="utf-8"))
        return [service for service in document["services"] if isinstance(service, dict)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):  # found by the check of Blueprints
        return []


def _values(service: Mapping[str, Any]) -> dict[str, str]:
    variables = cast("list[Any]", service.get("envVars") or [])
    pairs = [cast("dict[str, Any]", one) for one in variables if isinstance(one, dict)]
    return {str(one.get("key")): str(one["value"]) for one in pairs if one.get("value") is not None}


def _of_dockerfile(path: Path, arguments: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if CUDA_BASES.search(text):
        yield str(path), "starts from an image with CUDA"
    defaults = dict(re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE))
    given = {name: value.strip().strip("\"'") for name, value in {**defaults, **arguments}.items()}
    if ARGUMENT in defaults:
        has_torch = {"engine", "lora"} & set(given.get("EXTRAS", "engine").split(","))
        if has_torch and _cuda_of(given[ARGUMENT]) != "":
            yield str(path), f"takes torch with CUDA: {ARGUMENT} is {given[ARGUMENT] or 'empty, so from PyPI'}"
        return
    yield from _of_commands(text, path.parent, str(path))


def _of_commands(text: str, folder: Path, where: str) -> Iterator[tuple[str, str]]:
    """What the commands of a build install by pip or uv, by name or from a file of requirements."""
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        if "pip install" not in line or re.search(r"whl/cpu|\+cpu", line):
            continue
        if re.search(r"\s['\"]?torch\b", line.partition("pip install")[2]):
            yield where, "installs torch from PyPI, whose wheels are built for CUDA"
        for name in re.findall(r"(?:-r|--requirement)[ =]?(\S+)", line):
            yield from _of_requirements(folder / name)


def _of_requirements(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    found = [line.split()[0] for line in text.splitlines() if PACKAGE.match(line) and "+cpu" not in line]
    only_torch = all(name.lower().startswith("torch") for name in found)
    if found and not (only_torch and "whl/cpu" in text):
        yield str(path), f"installs {', '.join(found[:3])}: wheels with CUDA"


CHECKS = (here, uncompiled, driver, combination, cuda_wheels)
