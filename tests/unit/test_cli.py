import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from serve.errors import ConfigError, ModelLoadError, ServeError
from trimaran import demo_model
from trimaran.cli import main
from trimaran.cli_reference import commands
from trimaran.doctor.model import KINDS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The argument lists that the server was started with; it is replaced, and so is the demo model."""
    calls: list[list[str]] = []

    def serve_main(argv: list[str]) -> int:
        calls.append(argv)
        return 0

    stand_in = ModuleType("serve.__main__")
    stand_in.main, stand_in.leave = serve_main, sys.exit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "serve.__main__", stand_in)
    monkeypatch.setattr(demo_model, "prepare", lambda: Path("/demo"))
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    return calls


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["demo-model", "--help"]])
def test_cli_help_is_quick(arguments: list[str]) -> None:
    code = (
        "import sys; from trimaran.cli import main\n"
        f"try: main({arguments!r}, prog_name='trimaran')\n"
        "finally: print('heavy:', sorted({'torch', 'fastapi', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


COMMANDS = dict(commands(main, "trimaran"))
LEAVES = {path: command for path, command in COMMANDS.items() if not isinstance(command, click.Group)}
LEAVES |= {path: COMMANDS[path] for path in ("trimaran deploy render", "trimaran deploy runpod")}
SERVING = frozenset({"trimaran run", "trimaran emulate modal", "trimaran emulate runpod"})
"""Commands that serve until Ctrl-C; their lines are a log."""

QUICK = frozenset({"trimaran config", "trimaran history", *(path for path in LEAVES if " keys " in path)})
"""Commands that read and write small files here, which takes no second."""

TELLING = SERVING | {
    "trimaran demo-model", "trimaran emulate render", "trimaran verify", "trimaran deploy render check",
    *(path for path in LEAVES if " deploy " in path),
}  # fmt: skip
"""Commands that say each step as they take it."""


@pytest.mark.parametrize("path", [path for path in COMMANDS if path != "trimaran"])
def test_cli_command_help_has_an_example(path: str) -> None:
    done = CliRunner().invoke(main, [*path.split()[1:], "--help"])
    assert done.exit_code == 0
    example = done.stdout.partition("Example: ")[2]
    assert "trimaran" in example
    assert path.split()[-1] in example


@pytest.mark.parametrize("path", sorted(LEAVES.keys() - SERVING))
def test_cli_command_prints_json_on_request(path: str) -> None:
    assert "--json" in [option for parameter in LEAVES[path].params for option in parameter.opts]


@pytest.mark.parametrize("path", sorted(LEAVES))
def test_cli_command_help_says_what_its_statuses_mean(path: str) -> None:
    said = CliRunner().invoke(main, [*path.split()[1:], "--help"]).stdout
    assert re.search(r"status\W+\d", said, re.IGNORECASE)


@pytest.mark.parametrize("path", sorted(LEAVES.keys() - QUICK - TELLING))
def test_cli_command_that_may_take_a_second_tells_what_it_waits_for(path: str) -> None:
    callback = LEAVES[path].callback
    assert callback is not None
    assert "with waiting(" in Path(inspect.getfile(inspect.unwrap(callback))).read_text(encoding="utf-8")


def test_cli_command_that_is_terminated_ends_what_it_started() -> None:
    ended: list[str] = []

    @click.command()
    def working() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(10)
        finally:
            ended.append("its server")

    main.add_command(working)
    try:
        assert CliRunner().invoke(main, ["working"]).exit_code == 128 + signal.SIGTERM
    finally:
        del main.commands["working"]
    assert ended == ["its server"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("value", ["1", "true"])
def test_cli_asks_nothing_under_ci(value: str) -> None:
    @click.command()
    def asking() -> None:
        click.confirm("Really?", abort=True)

    main.add_command(asking)
    try:
        done = CliRunner(env={"CI": value}).invoke(main, ["asking"], input="y\n")
        assert (done.exit_code, "--yes" in done.stderr) == (2, True)
        assert CliRunner(env={"CI": ""}).invoke(main, ["asking"], input="y\n").exit_code == 0
    finally:
        del main.commands["asking"]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "trimaran").rglob("*.py")]
    assert not [text for text in sources if re.search(r"\binput\(|getpass|sys\.stdin", text)], (
        "click's own can be refused"
    )


def test_cli_version_is_the_projects() -> None:
    done = CliRunner().invoke(main, ["--version"])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout in (f"trimaran, version {version}\n", "trimaran, version 0+source\n")


@pytest.mark.parametrize(
    ("arguments", "argv"),
    [
        ([], ["--model=/demo"]),
        (["--port", "9000"], ["--model=/demo", "--port=9000"]),
        (["Qwen/Qwen3-0.6B"], ["--model=Qwen/Qwen3-0.6B"]),
        (["m", "--host", "::1", "--port", "0"], ["--model=m", "--host", "::1", "--port", "0"]),
        (["--host", "::1", "m", "--max-queue", "8"], ["--model=m", "--host=::1", "--max-queue", "8"]),
        (["--max-queue", "8"], ["--model=/demo", "--max-queue", "8"]),
        (["--engine", "echo"], ["--engine", "echo"]),
        (["--model=m"], ["--model=m"]),
    ],
)
def test_run_passes_its_arguments_on(arguments: list[str], argv: list[str], served: list[list[str]]) -> None:
    assert CliRunner().invoke(main, ["run", *arguments]).exit_code == 0
    assert served == [argv]


def test_run_ends_with_the_servers_status() -> None:
    command = [sys.executable, "-m", "trimaran.cli", "run", "m", "--port", "70000000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "SERVE_PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_leaves_the_model_to_the_environment(served: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SERVE_MODEL", "m"), ("SERVE_ENGINE", "echo")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            CliRunner().invoke(main, ["run"])
    Path(".env").write_text("SERVE_MODEL=m\n")
    CliRunner().invoke(main, ["run"])
    assert served == [[], [], []]


def test_emulator_of_runpod_wants_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it each worker would end, and be replaced by the next one."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "runpod" else find_spec(name))
    done = CliRunner(env={"SERVE_ENGINE": "echo"}).invoke(main, ["emulate", "runpod"])
    assert done.exit_code == 2
    assert "pip install -e '.[runpod]'" in done.stderr


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("set this"), 2), (ModelLoadError("do that"), 3), (ServeError("oh"), 1)]
)
def test_cli_shows_our_errors_without_a_traceback(
    error: ServeError, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise error

    monkeypatch.setattr(demo_model, "prepare", fail)
    done = CliRunner().invoke(main, ["demo-model"])
    assert (done.exit_code, done.stdout, done.stderr) == (status, "", f"trimaran: {error.message}\n")


def test_demo_model_prints_only_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "prepare", lambda: Path("/cache/demo"))
    assert CliRunner().invoke(main, ["demo-model"]).stdout == "/cache/demo\n"


def test_guide_of_doctor_names_every_finding() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trimaran/doctor").glob("*.py"))
    made = set(re.findall(r"Finding\(\s*\"([a-z0-9-]+)\"", sources)) | {name for _, name, _ in KINDS}
    guide = set(re.findall(r"`([a-z0-9-]+)`", (ROOT / "docs/guides/doctor.md").read_text(encoding="utf-8")))
    assert "gated-model" in made
    assert made <= guide
