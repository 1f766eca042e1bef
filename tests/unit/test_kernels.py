"""Compiling the engine's kernels: once, beside their sources, or the reason with the remedy."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from serve import kernels

COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo "$@" >> {log}
{script}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of our own on a machine that they are for."""
    folder = tmp_path / "kernels"
    shutil.copytree(kernels.FOLDER, folder, ignore=shutil.ignore_patterns("*.so*"))
    monkeypatch.setattr(kernels, "FOLDER", folder)
    monkeypatch.setattr(kernels, "is_for_this_machine", lambda: True)
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A compiler that does what it is told; returns where it notes its calls."""

    def make(script: str = 'echo made > "$2"') -> Path:
        path, log = tmp_path / "cc", tmp_path / "log"
        path.write_text(COMPILER.format(log=log, script=script))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CC", str(path))
        return log

    return make


def test_library_is_compiled_once(folder: Path, compiler) -> None:
    log = compiler()
    assert kernels.main() == 0
    assert kernels.library().read_text() == "made\n"
    assert kernels.main() == 0
    assert len(log.read_text().splitlines()) == 1
    assert [path.name for path in folder.glob("*.so*")] == [kernels.library().name]


def test_other_sources_are_another_library_and_the_old_one_goes(folder: Path, compiler) -> None:
    compiler()
    old = kernels.compile_library()
    (folder / "products.h").write_text("// changed")
    assert kernels.library() != old
    assert kernels.compile_library().exists()
    assert not old.exists()


def test_library_that_another_process_made_meanwhile_stays(folder: Path, compiler) -> None:
    compiler(f'echo made > "$2"; echo theirs > {kernels.library()}')
    assert kernels.compile_library().read_text() == "made\n"
    assert [path.name for path in folder.glob("*.so*")] == [kernels.library().name]


def test_folder_that_cannot_be_written_is_a_reason(
    folder: Path, compiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = compiler()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert kernels.main() == 1
    said = capsys.readouterr().err
    assert "Compiling failed: [Errno 13] Permission denied" in said
    assert "slower on a CPU" in said
    assert not log.exists()


def test_failed_compilation_leaves_nothing_and_says_what_the_compiler_said(folder: Path, compiler, capsys) -> None:
    compiler('echo half > "$2"; echo "no such header" >&2; exit 3')
    assert kernels.main() == 1
    said = capsys.readouterr().err
    assert "no such header" in said
    assert "slower on a CPU" in said
    assert not list(folder.rglob("*.so*"))


def test_missing_compiler_is_named_with_the_way_to_get_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    assert kernels.main() == 1
    assert "sudo apt-get install gcc libc6-dev" in capsys.readouterr().err
    monkeypatch.setenv("CC", "ccache nowhere-cc")
    assert kernels.main() == 1
    assert "CC names ccache, which is not there" in capsys.readouterr().err
    monkeypatch.setenv("CC", "'gcc")
    assert kernels.main() == 1
    assert "CC='gcc is no command: No closing quotation" in capsys.readouterr().err


def test_compiler_that_writes_nothing_is_a_reason(folder: Path, compiler, capsys) -> None:
    compiler("true")
    assert kernels.main() == 1
    assert "No such file" in capsys.readouterr().err
    assert not list(folder.glob("*.so*"))


def test_obstacle_is_what_stands_in_the_way_first(folder: Path, compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler()
    monkeypatch.setattr(kernels, "missing_instructions", list)
    assert "not compiled: python -m serve.kernels" in str(kernels.obstacle())
    kernels.compile_library()
    assert kernels.obstacle() is None
    monkeypatch.setattr(kernels, "missing_instructions", lambda: ["avx512_bf16"])
    assert "avx512_bf16, which this CPU lacks" in str(kernels.obstacle())
    monkeypatch.setattr(kernels, "is_for_this_machine", lambda: False)
    assert "for x86-64 and Linux" in str(kernels.obstacle())


def test_nothing_is_compiled_for_other_machines(
    folder: Path, compiler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = compiler()
    monkeypatch.setattr(kernels, "is_for_this_machine", lambda: False)
    assert kernels.main() == 0
    assert "torch's own" in capsys.readouterr().err
    assert not log.exists()


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ("fpu avx512f avx512bw avx512vl avx512_bf16 amx", []),
        ("fpu avx512f avx512bw avx512vl", ["avx512_bf16"]),
        ("fpu avx2", list(kernels.INSTRUCTIONS)),
    ],
)
def test_missing_instructions_are_named(flags: str, missing: list[str], tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: avx512_bf16\n\nprocessor\t: 1\n")
    assert kernels.missing_instructions(cpuinfo) == missing
    assert kernels.missing_instructions(tmp_path / "none") == list(kernels.INSTRUCTIONS)
