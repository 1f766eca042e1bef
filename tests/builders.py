"""What builds images here: Docker where a daemon answers, else buildah, podman and runc, as root.

Without a daemon a Debian root file system with Python, made by mmdebstrap, stands in for the official Python image; set
``BASE_IMAGE`` to use a real one.  ``TRIMARAN_IMAGE_STORE`` names a folder that keeps images between runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from containers import Tool, call, measured
from support import missing

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
DEBIAN_TOOLS = ("buildah", "podman", "runc", "mmdebstrap")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAND_IN = "localhost/trimaran-standin-python:bookworm"


@contextmanager
def open_tool() -> Iterator[Tool]:
    """Docker, or Debian's tools with a store that is removed at the end."""
    if _docker_answers():
        yield Tool(("docker", "build"), ("docker",), base=os.environ.get("BASE_IMAGE"))
        return
    absent = [name for name in DEBIAN_TOOLS if shutil.which(name) is None]
    if absent:
        missing(f"building an image needs Docker, or as root: apt-get install {' '.join(DEBIAN_TOOLS)}")
    if os.geteuid() != 0:
        missing("building an image without Docker needs root: sudo scripts/image")
    kept = os.environ.get("TRIMARAN_IMAGE_STORE")
    store = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="trimaran-image-", dir=_memory()))
    try:
        yield _debian_tool(store)
    finally:
        if not kept:
            _remove(store)


def _docker_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "version"], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _memory() -> str | None:
    """A tmpfs with room for an image, where unpacking takes half the time; else the default folder."""
    shared = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 6e9 else None


def _remove(store: Path) -> None:
    for mounted in Path("/proc/mounts").read_text().splitlines():
        if (where := mounted.split()[1]).startswith(str(store)):
            subprocess.run(["umount", "--lazy", where], capture_output=True)
    shutil.rmtree(store, ignore_errors=True)


def _debian_tool(store: Path) -> Tool:
    scratch = store / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    # For buildah's cache mounts and mmdebstrap's files, which wait for every fsync on a disk.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    places = ("--root", f"{store}/root", "--runroot", f"{store}/run", "--storage-driver", "overlay")
    podman = ("podman", *places, "--runtime", "runc", "--cgroup-manager", "cgroupfs")
    base = os.environ.get("BASE_IMAGE") or _stand_in(podman, scratch, environment)
    mounts = [f"--volume={source}:{target}:ro" for source, target in _package_sources(scratch).items()]
    build = ("buildah", *places, "bud", "--isolation", "chroot", "--format", "docker", "--layers", *mounts)
    # Lower than the hard limits, which podman may not raise without CAP_SYS_RESOURCE.
    limits = ("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096")
    return Tool(build, podman, limits, base, environment)


def _stand_in(podman: Sequence[str], scratch: Path, environment: Mapping[str, str]) -> str:
    if subprocess.run([*podman, "image", "exists", STAND_IN], capture_output=True).returncode == 0:
        return STAND_IN
    archive = scratch / "base.tar"
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale")]
    hook = 'ln -s /usr/bin/python3 "$1/usr/local/bin/python"; rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED'
    packages = "--include=ca-certificates,python3,python3-venv,python3-pip"
    with measured("stand-in base"):
        call(
            *("mmdebstrap", "--quiet", "--variant=minbase", packages, *left_out, f"--customize-hook={hook}"),
            *("bookworm", archive),
            timeout_s=600,
            env=environment,
        )
        path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        call(*podman, "import", "--quiet", "--change", path, archive, STAND_IN, timeout_s=300)
    archive.unlink()
    return STAND_IN


def _package_sources(scratch: Path) -> Mapping[Path, Path]:
    """Files of this machine that pip needs inside a build; mounted, they never become part of the image."""
    mounts = {CERTIFICATES: CERTIFICATES} if CERTIFICATES.exists() else {}
    lines = ["[global]", *(f"cert = {path}" for path in mounts)]
    for name in ("index-url", "extra-index-url", "find-links"):
        value = _pip(name)
        if value:
            lines.append(f"{name} = {value}")
        for place in value.split():
            folder = Path(place.removeprefix("file://").removesuffix("/simple"))
            if folder.is_absolute() and folder.is_dir():
                mounts[folder] = folder
    configuration = scratch / "pip.conf"
    configuration.write_text("\n".join(lines) + "\n")
    return {**mounts, configuration: Path("/etc/pip.conf")}


def cpu_wheels() -> dict[str, str]:
    """The build arguments that bring the CPU's kernels, and torch unless a folder of wheels here has it already."""
    has_wheel = any(
        Path(place).is_dir() and list(Path(place).glob("torch-*+cpu-*")) for place in _pip("find-links").split()
    )
    return {"KERNELS": "1"} | ({} if has_wheel else {"TORCH_INDEX_URL": CPU_INDEX})


def _pip(name: str) -> str:
    """A value of pip's configuration; empty when it has none."""
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    value = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return os.environ.get(f"PIP_{name.upper().replace('-', '_')}", value)
