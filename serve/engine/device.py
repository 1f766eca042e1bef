"""Where and how the model computes.  Every choice comes with its reason, and both are logged.

Torch is imported inside the functions: importing this file stays cheap.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from serve.engine import cgroup
from serve.errors import ModelLoadError

if TYPE_CHECKING:
    import torch


NVIDIA_DRIVER = Path("/dev/nvidiactl")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """A value and why it was chosen."""

    value: T
    reason: str


def import_torch() -> None:
    """Import torch as a server needs it.  Whatever loads a model calls this first; a later ``import torch`` is free."""
    # Spinning OpenMP threads starve the event loop and each other; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _preload_torch()
    importlib.import_module("torch")


def _preload_torch() -> None:
    """Map torch's libraries without holding the GIL, so that ``import torch`` blocks the event loop less.

    ``import`` holds it for the whole ``dlopen`` (130-280 ms measured on two cores); a foreign call does not.
    Failing is harmless: the import does the work then.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations or os.name != "posix":
        return
    library = Path(spec.submodule_search_locations[0]) / "lib" / "libtorch_python.so"
    if library.exists():
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.restype = ctypes.c_void_p
        dlopen.argtypes = [ctypes.c_char_p, ctypes.c_int]
        dlopen(str(library).encode(), os.RTLD_NOW)


@contextmanager
def without_cuda() -> Generator[None]:
    """Libraries that ask torch for GPUs hear of none.

    Asked without a GPU, CUDA's driver would remember the answer, and the process that a snapshot is restored into
    would never see its GPU.
    """
    import torch  # noqa: PLC0415

    is_available, device_count = torch.cuda.is_available, torch.cuda.device_count
    torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0
    try:
        yield
    finally:
        torch.cuda.is_available, torch.cuda.device_count = is_available, device_count


def choose_device(requested: str) -> Choice[torch.device]:
    """``auto``: CUDA when there is a usable GPU, else CPU.

    Raises:
        ModelLoadError: CUDA was asked for and is not there, or a GPU is there that this torch cannot use: a silent
            fall back to the CPU would be paid for and hardly noticed.
    """
    import torch  # noqa: PLC0415

    if requested == "cpu":
        return Choice(torch.device("cpu"), "SERVE_DEVICE=cpu")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        capability, built_for = torch.cuda.get_device_capability(0), torch.cuda.get_arch_list()
        if not is_built_for(capability, built_for):
            raise ModelLoadError(
                f"the {name} has compute capability {capability[0]}.{capability[1]}, but this torch is built for "
                f"{', '.join(built_for)}; take another GPU or another build of torch, or set SERVE_DEVICE=cpu"
            )
        return Choice(torch.device("cuda", 0), f"{name} found")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"} and requested == "auto":
        return Choice(torch.device("cpu"), "CUDA_VISIBLE_DEVICES hides the GPUs")
    if torch.version.cuda is not None and NVIDIA_DRIVER.exists():
        raise ModelLoadError(
            f"there is an NVIDIA driver{_driver_version()}, but this torch (CUDA {torch.version.cuda}) cannot use it: "
            "it is probably too old; take a newer host or a torch built for an older CUDA, or set SERVE_DEVICE=cpu"
        )
    missing = "this torch is built without CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU or driver"
    if requested == "cuda":
        raise ModelLoadError(f"SERVE_DEVICE=cuda, but {missing}; use SERVE_DEVICE=auto to run on the CPU")
    return Choice(torch.device("cpu"), missing)


def is_built_for(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether kernels for ``sm_`` of the same generation are there, or ``compute_`` code that the driver translates.

    Args:
        capability: The GPU's.
        built_for: As :func:`torch.cuda.get_arch_list` names it; empty says nothing.
    """
    own = capability[0] * 10 + capability[1]
    for name in built_for:
        kind, _, digits = name.partition("_")
        number = int("".join(filter(str.isdigit, digits)) or 0)
        if number <= own and (kind == "compute" or number // 10 == capability[0]):
            return True
    return not built_for


def _driver_version() -> str:
    """As `` 535.104.05``; empty when it cannot be read."""
    try:
        words = DRIVER_VERSION.read_text(encoding="utf-8").splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((f" {word}" for word in words if word[:1].isdigit() and "." in word), "")


def choose_dtype(requested: str, device: torch.device, checkpoint: str | None) -> Choice[torch.dtype]:
    """``auto``: bfloat16 where the hardware computes in it, else float16 on CUDA and float32 on the CPU.

    A float32 checkpoint is not kept: inference does not gain from it.
    """
    import torch  # noqa: PLC0415

    if requested != "auto":
        dtype: torch.dtype = getattr(torch, requested)
        return Choice(dtype, f"SERVE_DTYPE={requested}")
    origin = f"checkpoint is {checkpoint}" if checkpoint else "checkpoint names none"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice(torch.bfloat16, f"the GPU computes in bfloat16; {origin}")
        return Choice(torch.float16, f"the GPU has no bfloat16; {origin}")
    if _cpu_has_bfloat16():
        return Choice(torch.bfloat16, f"the CPU computes in bfloat16; {origin}")
    return Choice(torch.float32, f"the CPU has no bfloat16 instructions; {origin}")


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def choose_threads(requested: int | None) -> Choice[int]:
    """The container's CPU quota, never the host's cores: more threads than cores stall each other."""
    if requested is not None:
        return Choice(requested, f"SERVE_THREADS={requested}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup.cpus()
    if quota is not None and quota < cores:
        return Choice(max(1, int(quota)), f"the container may use {quota:g} of {cores} cores")
    return Choice(cores, f"{cores} cores may be used")


def available_memory(device: torch.device) -> int:
    """Bytes that are free for the KV cache: VRAM on CUDA, else RAM within the container's limit."""
    import torch  # noqa: PLC0415

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_ram()


def available_ram() -> int:
    """Bytes of RAM that are free within the container's limit."""
    free = [_meminfo_available(), cgroup.free_memory()]
    return min((size for size in free if size is not None), default=2**30)


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def gpu_memory() -> dict[str, int]:
    """Bytes of the GPU's memory by use; empty while no GPU is in use.  Asks the driver, which may hang."""
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)  # absent in the middle of the import
    if cuda is None or not cuda.is_initialized():
        return {}
    try:
        free, total = cuda.mem_get_info()
        return {
            "allocated": cuda.memory_allocated(),
            "reserved": cuda.memory_reserved(),
            "peak": cuda.max_memory_allocated(),
            "free": free,
            "total": total,
        }
    except RuntimeError:  # a GPU that has failed; the engine says so itself
        return {}
