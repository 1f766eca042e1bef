"""``trimaran.toml``: read below the environment, strict about its keys; `trimaran config` and `trimaran init`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from checkpoints import model_files, write
from click.testing import CliRunner

from serve.errors import ConfigError
from serve.knobs import Knobs
from serve.setting_file import FILE, FileSource, section_of
from serve.setting_values import secret_names
from serve.settings import Settings, load_settings
from trimaran.cli import main
from trimaran.config.schema import schema_text

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner(env=environment).invoke(main, [*arguments])


def test_flag_wins_over_environment_over_dotenv_over_file_over_default(monkeypatch):
    assert Settings.model_fields["max_queue"].default == 64
    FILE.write_text('[model]\nengine = "echo"\n[serve]\nmax_queue = 1\n')
    assert load_settings().max_queue == 1
    Path(".env").write_text("SERVE_MAX_QUEUE=2\n")
    assert load_settings().max_queue == 2
    monkeypatch.setenv("SERVE_MAX_QUEUE", "3")
    assert load_settings().max_queue == 3
    assert load_settings(max_queue="4").max_queue == 4


def test_ports_other_variable_wins_over_the_file_too(monkeypatch):
    FILE.write_text('[model]\nengine = "echo"\n[serve]\nport = 9001\n')
    assert load_settings().port == 9001
    monkeypatch.setenv("PORT", "9002")
    assert load_settings().port == 9002
    assert load_settings(port=9003).port == 9003


def test_file_is_told_to_containers():
    FILE.write_text('[model]\nengine = "echo"\nmodel_folders = ["/a", "/b"]\n[serve]\nstrict = true\n')
    public, secret = load_settings().environment()
    assert public == {"SERVE_ENGINE": "echo", "SERVE_MODEL_FOLDERS": "/a,/b", "SERVE_STRICT": "true"}
    assert secret == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[serve]\nmax_qeue = 3", r"\[serve\] max_qeue is no setting; did you mean max_queue\?"),
        ("[server]\nmax_queue = 3", r"\[server\] is no section; did you mean serve\?"),
        ("[limits]\nmax_queue = 3", r"max_queue belongs in \[serve\], not in \[limits\]"),
        ('[auth]\napi_keys = ["sk-1"]', r"api_keys is a secret, .* export SERVE_API_KEYS"),
        ("max_queue = 3", r"\[max_queue\] is no section"),
        ("serve = 3", r"write \[serve\]"),
        ("[serve\n", r"trimaran\.toml cannot be read: "),
        ("[serve]\nmax_queue = -3", r"SERVE_MAX_QUEUE=-3: "),
    ],
)
def test_what_is_wrong_in_the_file_is_an_error_with_a_remedy(text, message):
    FILE.write_text(text + '\n[model]\nengine = "echo"\n')
    with pytest.raises(ConfigError, match=message):
        load_settings()


def test_every_setting_has_one_section_and_can_be_written_there():
    for name in set(Settings.model_fields) - secret_names(Settings.model_fields):
        FILE.write_text(f"[{section_of(name)}]\n{name} = 1\n")
        assert FileSource(Settings)() == {name: 1}


def test_knobs_of_a_platform_come_from_its_section(monkeypatch):
    table = {"GPU": ("", "which"), "MAX_CONTAINERS": ("10", "most"), "REGION": ("", "where")}
    FILE.write_text('[modal]\ngpu = ["H100", "A100-80GB"]\nmax_containers = 3\n')
    monkeypatch.setenv("SERVE_MODAL_MAX_CONTAINERS", "4")
    knobs = Knobs("SERVE_MODAL_", table)
    assert knobs.names("GPU") == ["H100", "A100-80GB"]
    assert knobs.count("MAX_CONTAINERS", 1, 10) == 4
    assert knobs.given() == {"SERVE_MODAL_GPU": "H100,A100-80GB", "SERVE_MODAL_MAX_CONTAINERS": "4"}
    FILE.write_text('[modal]\ngpus = "H100"\n')
    with pytest.raises(ConfigError, match="did you mean gpu"):
        Knobs("SERVE_MODAL_", table)


def test_config_shows_every_origin_and_no_secret():
    FILE.write_text('[model]\nengine = "echo"\n[serve]\nmax_queue = 1\n[modal]\ngpu = "L4"\n[runpod]\nidle = 20\n')
    Path(".env").write_text("SERVE_LOG_LEVEL=debug\n")
    secrets = {"SERVE_API_KEYS": "sk-hidden", "SERVE_RECORDS_URL": "postgresql://me:hidden@db/x"}
    given = {**secrets, "SERVE_REMOTE_URL": "https://me:hidden@example.org", "SERVE_MAX_QUEUE": "2"}
    done = run("config", "--origin", "--json", "--max-model-len", "100", **given)
    assert done.exit_code == 0, done.output
    assert "hidden" not in done.output
    shown = {value["name"]: (value["value"], value["origin"]) for value in json.loads(done.stdout)}
    assert shown["SERVE_ENGINE"] == ("echo", "trimaran.toml")
    assert shown["SERVE_MAX_QUEUE"] == ("2", "environment SERVE_MAX_QUEUE")
    assert shown["SERVE_LOG_LEVEL"] == ("debug", ".env SERVE_LOG_LEVEL")
    assert shown["SERVE_MAX_MODEL_LEN"] == ("100", "flag --max-model-len")
    assert shown["SERVE_API_KEYS"] == ("********", "environment SERVE_API_KEYS")
    assert shown["SERVE_STRICT"] == ("false", "default")
    assert shown["SERVE_MODAL_GPU"] == ("L4", "trimaran.toml")
    assert shown["deploy runpod --idle"] == ("20", "trimaran.toml")
    assert {f"SERVE_{name.upper()}" for name in Settings.model_fields} <= set(shown)


@pytest.mark.parametrize(
    "value",
    [
        "https://me:hid@den@example.org/x", "https://me:hidden/a@example.org", "https://example.org/v1?api_key=hidden",
        "https://example.org/?a=1&access_token=hidden&b=2", "hf_hiddenhiddenhidden", "sk-hiddenhiddenhidden",
    ],
)  # fmt: skip
def test_config_masks_a_secret_wherever_it_stands(value):
    render = f'[render]\nenv = ["A=b", "MY_TOKEN=hidden", "X={value}"]\n'
    FILE.write_text(f'[model]\nengine = "echo"\n{render}[runpod]\nregistry = "{value}"\n')
    done = run("config", "--all", "--origin", "--traces-url", value, SERVE_REMOTE_URL=value, SERVE_MODAL_LABEL=value)
    assert done.exit_code == 0, done.output
    assert "hid" not in done.output
    assert "A=b" in done.output


def test_config_refuses_a_wrong_option_of_a_platform():
    FILE.write_text('[model]\nengine = "echo"\n[runpod]\nidel = 20\n')
    done = run("config", "--origin")
    assert done.exit_code == 2
    assert "[runpod] idel is no option; did you mean idle?" in done.stderr


@pytest.mark.parametrize("command", [["config"], ["plan"], ["run"], ["emulate", "render"], ["doctor"]])
def test_dotenv_that_is_no_text_is_told(command):
    Path(".env").write_bytes(b"SERVE_MODEL=\xff\n")
    done = run(*command)
    assert done.exit_code in (1, 2)
    assert ".env cannot be read: it is not UTF-8" in done.output
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings()


def test_file_that_cannot_be_read_is_replaced_by_init():
    FILE.write_bytes(b"[serve\xff")
    assert run("plan", "x").exit_code == 2
    assert run("init", "me/tiny", "--no-plan", "--force").exit_code == 0
    assert load_settings().model == "me/tiny"


@pytest.mark.parametrize("name", ['a "quoted" one', "mit Ümlaut 🐳", "tab\tand\x7fdel", "back\\slash", "#no comment"])
def test_init_writes_any_folders_name(name, tmp_path):
    write(tmp_path / name, model_files())
    done = run("init", str(tmp_path / name), "--no-plan", "--json")
    assert done.exit_code == 0, done.output
    assert tomllib.loads(FILE.read_text(encoding="utf-8"))["model"]["model"] == str(tmp_path / name)
    assert json.loads(done.stdout)["model"] == {"model": str(tmp_path / name)}
    assert load_settings().model == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a b c", "", "https://huggingface.co/a/b", "a/b/c/d:e"])
def test_init_refuses_what_is_no_model(name):
    done = run("init", name)
    assert done.exit_code in (2, 3)
    assert not FILE.exists()


def test_init_that_cannot_write_says_so():
    FILE.mkdir()
    done = run("init", "me/tiny", "--no-plan", "--force")
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr


def test_config_says_what_the_server_would_refuse():
    done = run("config")
    assert done.exit_code == 2
    assert "SERVE_MODEL is not set" in done.stderr


def test_deploys_take_options_and_settings_from_the_file():
    FILE.write_text(
        '[model]\nmodel = "me/tiny"\n[serve]\nmax_queue = 3\n[runpod]\ngpu = "ADA_24"\nimage = "me/trimaran:1"\n'
        '[render]\nplan = "pro"\nimage = "me/trimaran:1"\n'
    )
    runpod = run("deploy", "runpod", "--dry-run", "--env", "SERVE_STRICT=true")
    body = json.loads(runpod.stdout)
    assert body["gpu"]["pools"] == ["ADA_24"]
    assert body["env"]["SERVE_MODEL"] == "me/tiny"
    assert (body["env"]["SERVE_MAX_QUEUE"], body["env"]["SERVE_STRICT"]) == ("3", "true")
    assert json.loads(run("deploy", "runpod", "--dry-run", "--gpu", "AMPERE_80").stdout)["gpu"]["pools"] == [
        "AMPERE_80"
    ]
    render = run("deploy", "render", "--dry-run").stdout
    assert "plan: pro" in render
    assert "value: me/tiny" in render
    assert "key: SERVE_MAX_QUEUE" in render


def test_wrong_option_of_a_deploy_is_an_error_with_a_suggestion():
    FILE.write_text('[runpod]\ngpus = "ADA_24"\n')
    done = run("deploy", "runpod", "--dry-run")
    assert done.exit_code == 2
    assert "[runpod] gpus is no option; did you mean gpu?" in done.stderr


def test_init_writes_a_file_that_is_read_and_fits_the_schema(tmp_path):
    write(tmp_path / "model", model_files())
    done = run("init", "./model", "--no-plan")
    assert done.exit_code == 0, done.output
    assert load_settings().model == "./model"
    document = tomllib.loads(FILE.read_text())
    assert valid(document)
    assert len(FILE.read_text().splitlines()) < 30
    again = run("init", "./model", "--no-plan")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert run("init", "other/model", "--no-plan", "--force").exit_code == 0
    assert load_settings().model == "other/model"


def valid(document: dict[str, Any]) -> bool:
    return jsonschema_rs.Draft202012Validator(json.loads(schema_text())).is_valid(document)


def test_schema_knows_what_the_server_knows():
    assert valid({"model": {"engine": "echo", "dtype": "auto"}, "serve": {"max_queue": 3, "strict": True}})
    assert valid({"modal": {"gpu": ["L4"], "max_containers": 2}, "runpod": {"gpu": ["ADA_24"], "idle": 5}})
    wrong = [
        {"serve": {"max_qeue": 3}}, {"serve": {"max_queue": "many"}}, {"model": {"engine": "vllm"}}, {"x": {}},
        {"auth": {"api_keys": ["sk"]}}, {"modal": {"gpus": "L4"}}, {"render": {"disk_gb": "big"}},
    ]  # fmt: skip
    assert [document for document in wrong if valid(document)] == []


def test_schema_file_is_current():
    page = ROOT / "docs/reference/trimaran.schema.json"
    assert page.read_text(encoding="utf-8") == schema_text(), "run scripts/reference"


def test_emulator_of_modal_is_told_what_the_file_says(tmp_path, monkeypatch):
    from trimaran.emulate.modal.session import prepare_environment

    write(tmp_path / "model", model_files())
    FILE.write_text('[model]\nmodel = "./model"\n[serve]\nmax_queue = 3\n[modal]\ngpu = "L4"\n')
    monkeypatch.setenv("SERVE_MAX_QUEUE", "4")
    environment, _ = prepare_environment(None)
    assert environment["SERVE_MODEL"] == str(tmp_path / "model")
    assert (environment["SERVE_MODAL_GPU"], environment["SERVE_MAX_QUEUE"]) == ("L4", "4")
    assert prepare_environment(str(tmp_path))[0]["SERVE_MODEL"] == str(tmp_path)
