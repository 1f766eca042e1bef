"""Compiles the engine's kernels for CPUs: ``python -m serve.kernels``, once, where there is a C compiler.

Nothing is compiled while a server runs: the library lies beside its sources, and its name says of which it was made.
The standard library only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "engine" / "kernels"

INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16")
"""As Linux lists them in ``/proc/cpuinfo``: Intel's since Cooper Lake (2020), AMD's since Zen 4 (2022)."""

FLAGS = "-std=c11 -O3 -shared -fPIC -mfma -mavx512f -mavx512bw -mavx512vl -mavx512bf16"
COMPILERS = ("cc", "gcc", "clang")
CPUINFO = Path("/proc/cpuinfo")


class NotCompiled(Exception):
    """There is no library, for a reason that the message gives with the remedy."""


def sources() -> list[Path]:
    """What the library is made of."""
    return sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")])


def library() -> Path:
    """Where the library of these sources is, or would be."""
    digest = hashlib.sha256(FLAGS.encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return FOLDER / f"kernels-{digest.hexdigest()[:16]}.so"


def is_for_this_machine() -> bool:
    """Whether the kernels are for its kind of processor at all."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def missing_instructions(cpuinfo: Path = CPUINFO) -> list[str]:
    """Which of :data:`INSTRUCTIONS` this processor lacks, or its virtual machine hides."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return list(INSTRUCTIONS)
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split()
    return [name for name in INSTRUCTIONS if name not in flags]


def obstacle() -> str | None:
    """Why a server on this machine does without the kernels; None where it has them."""
    if not is_for_this_machine():
        return "Trimaran's are for x86-64 and Linux"
    if missing := missing_instructions():
        return f"Trimaran's need {', '.join(missing)}, which this CPU lacks"
    return (
        "Trimaran's are not compiled: python -m serve.kernels, where there is a C compiler" if are_left_out() else None
    )


def are_left_out() -> bool:
    """Whether this machine could use the kernels, and they are not compiled."""
    return is_for_this_machine() and not missing_instructions() and not library().exists()


def compile_library() -> Path:
    """Compile, unless it was done before; drop what older sources left.

    Returns:
        The library.

    Raises:
        NotCompiled: there is no compiler, it fails, or the folder cannot be written to.
    """
    target = library()
    if target.exists():
        return target
    if not is_for_this_machine():
        raise NotCompiled(f"The kernels are for x86-64 and Linux, and this is {platform.machine()} and {sys.platform}.")
    command = [*_compiler(), *FLAGS.split(), *(str(path) for path in sources() if path.suffix == ".c")]
    try:
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".") as folder:
            made = Path(folder) / target.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode:
                raise NotCompiled(f"{command[0]} failed:\n{done.stderr.strip()}")
            made.replace(target)
        for path in FOLDER.glob("kernels-*.so"):
            if path != target:  # which another process may have put here meanwhile, too
                path.unlink(missing_ok=True)
    except OSError as error:
        raise NotCompiled(f"Compiling failed: {error}") from error
    return target


def _compiler() -> list[str]:
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise NotCompiled(f"CC={os.environ['CC']} is no command: {error}.  Unset it, or name a C compiler.") from error
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    if named:
        raise NotCompiled(f"CC names {named[0]}, which is not there.")
    raise NotCompiled("No C compiler was found.  Debian, Ubuntu: sudo apt-get install gcc libc6-dev")


def main() -> int:
    """The exit status: 0 also where there is nothing to compile for."""
    if not is_for_this_machine():
        sys.stderr.write("The engine's kernels are for x86-64 and Linux: here torch's own are used.\n")
        return 0
    try:
        path = compile_library()
    except NotCompiled as error:
        sys.stderr.write(f"{error}\nWithout its kernels the engine runs with torch's own: slower on a CPU.\n")
        return 1
    sys.stderr.write(f"The engine's kernels for CPUs: {path.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
