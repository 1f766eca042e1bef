from __future__ import annotations

import pytest

from serve.errors import ConfigError
from serve.settings import Settings, is_loopback, load_settings, unknown_variables


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no .env of the checkout


def from_environment(monkeypatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_argument_wins_over_environment_and_environment_over_file(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("SERVE_MODEL=file\nSERVE_MAX_QUEUE=3\nSERVE_PORT=1\n")
    monkeypatch.setenv("SERVE_PORT", "2")
    monkeypatch.setenv("SERVE_MAX_BODY_BYTES", "2048")
    settings = load_settings(port=3)
    assert (settings.model, settings.max_queue, settings.max_body_bytes, settings.port) == ("file", 3, 2048, 3)


def test_port_falls_back_to_the_platforms_variable(monkeypatch):
    assert from_environment(monkeypatch, SERVE_MODEL="m", PORT="10000").port == 10000
    assert from_environment(monkeypatch, SERVE_MODEL="m", PORT="10000", SERVE_PORT="9000").port == 9000


def test_empty_variable_counts_as_unset(monkeypatch):
    settings = from_environment(monkeypatch, SERVE_MODEL="m", SERVE_PORT="", SERVE_MAX_BATCH_SIZE="", SERVE_API_KEYS="")
    assert (settings.port, settings.max_batch_size, settings.api_keys) == (8000, None, ())


def test_kubernetes_service_variable_is_explained(monkeypatch):
    with pytest.raises(ConfigError, match="Kubernetes"):
        from_environment(monkeypatch, SERVE_MODEL="m", SERVE_PORT="tcp://10.0.0.1:80")


@pytest.mark.parametrize(
    ("name", "value"),
    [("SERVE_PORT", "eighty"), ("SERVE_MAX_QUEUE", "-1"), ("SERVE_DTYPE", "int3"), ("SERVE_ENGINE", "vllm"),
     ("SERVE_LOG_LEVEL", "loud"), ("SERVE_LOAD_WAIT_S", "nan"), ("SERVE_ALLOW_ANONYMOUS", "maybe")],
)  # fmt: skip
def test_wrong_value_is_named_with_its_variable(monkeypatch, name, value):
    with pytest.raises(ConfigError, match=f"{name}='{value}'"):
        from_environment(monkeypatch, SERVE_MODEL="m", **{name: value})


def test_missing_model_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="SERVE_MODEL is not set: name a model folder"):
        load_settings()


def test_echo_engine_needs_no_model(monkeypatch):
    assert from_environment(monkeypatch, SERVE_ENGINE="echo").served_name == "echo"


def test_public_address_needs_keys_or_a_word(monkeypatch):
    with pytest.raises(ConfigError, match="SERVE_ALLOW_ANONYMOUS=true"):
        load_settings(model="m", host="0.0.0.0")  # noqa: S104
    assert load_settings(model="m", host="0.0.0.0", allow_anonymous=True).allow_anonymous  # noqa: S104
    assert load_settings(model="m", host="0.0.0.0", api_keys="k").api_keys  # noqa: S104
    assert load_settings(model="m", host="0.0.0.0", api_keys_file="keys.json").knows_callers  # noqa: S104
    assert load_settings(model="m", host="0.0.0.0", oidc_issuer="https://issuer").knows_callers  # noqa: S104


def test_budget_in_dollars_needs_a_price():
    with pytest.raises(ConfigError, match="SERVE_LIMIT_USD_PER_DAY needs the machine's price: set SERVE_USD_PER_HOUR"):
        load_settings(model="m", limit_usd_per_day=1)
    assert load_settings(model="m", limit_usd_per_day=1, usd_per_hour=2).allowance().usd_per_day == 1


@pytest.mark.parametrize("url", [None, "sqlite:///usage.db"])
def test_shared_limits_need_a_postgresql(url):
    with pytest.raises(
        ConfigError, match=r"SERVE_LIMITS_SHARED needs a PostgreSQL .* set SERVE_RECORDS_URL=postgresql://"
    ):
        load_settings(engine="echo", limits_shared=True, records_url=url)
    assert load_settings(engine="echo", limits_shared=True, records_url="postgres://u:p@h/n").limits_shared


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),  # noqa: S104
     ("::", False), ("192.168.0.4", False), ("example.com", False), ("localhost.example.com", False)],
)  # fmt: skip
def test_loopback_is_recognised(host, expected):
    assert is_loopback(host) is expected


def test_keys_are_split_trimmed_and_never_shown(monkeypatch):
    settings = from_environment(monkeypatch, SERVE_MODEL="m", SERVE_API_KEYS=" first-key ,second-key,, ")
    assert [key.get_secret_value() for key in settings.api_keys] == ["first-key", "second-key"]
    assert "first" not in repr(settings)


def test_error_never_shows_a_key(monkeypatch):
    with pytest.raises(ConfigError) as caught:
        load_settings(model="m", api_keys=["sekrit", 5])
    assert "sekrit" not in caught.value.message


def test_served_name_is_the_id_the_folder_or_the_setting(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert load_settings(model="Qwen/Qwen3-4B").served_name == "Qwen/Qwen3-4B"
    assert load_settings(model=str(folder)).served_name == "my-model"
    assert load_settings(model=f"{folder}/").served_name == "my-model"
    assert load_settings(model=str(folder), model_name="short").served_name == "short"


def test_unknown_variable_warns_with_the_nearest_name():
    warnings = unknown_variables(
        {"SERVE_MAX_BATCH_SIZEE": "3", "SERVE_MODEL": "m", "SERVE_MODAL_GPU": "L4", "HOME": "/"}
    )
    assert warnings == ["SERVE_MAX_BATCH_SIZEE is not a setting; did you mean SERVE_MAX_BATCH_SIZE?"]


def test_settings_are_frozen():
    settings = load_settings(model="m")
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_every_setting_is_described():
    assert all(field.description for field in Settings.model_fields.values())


def test_mounted_model_is_found_where_platforms_put_it(monkeypatch, tmp_path):
    first, second = tmp_path / "repository", tmp_path / "opt"
    monkeypatch.setenv("SERVE_MODEL_FOLDERS", f"{first}, {second}")
    with pytest.raises(ConfigError, match="SERVE_MODEL is not set"):
        load_settings()
    second.mkdir()
    (second / "config.json").write_text("{}")
    assert load_settings().model == str(second)
    first.mkdir()
    with_adapter = first / "adapter_config.json"
    with_adapter.write_text("{}")
    assert load_settings().model == str(first)
    assert from_environment(monkeypatch, SERVE_MODEL="owner/name").model == "owner/name"


def test_mounted_model_does_not_matter_to_the_echo_engine(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("SERVE_MODEL_FOLDERS", str(tmp_path))
    assert from_environment(monkeypatch, SERVE_ENGINE="echo").served_name == "echo"


def test_environment_gives_back_what_was_set_with_secrets_apart():
    given = Settings(
        model="owner/m",
        api_keys="a, b",
        allow_anonymous=True,
        device="cpu",
        load_wait_s=1.5,
        chat_template="x.jinja",
        _env_file=None,  # pyright: ignore[reportCallIssue]
    )
    public, secret = given.environment()
    assert secret == {"SERVE_API_KEYS": "a,b"}
    assert public == {
        "SERVE_ALLOW_ANONYMOUS": "true",
        "SERVE_CHAT_TEMPLATE": "x.jinja",
        "SERVE_DEVICE": "cpu",
        "SERVE_LOAD_WAIT_S": "1.5",
        "SERVE_MODEL": "owner/m",
    }


def test_environment_makes_the_same_settings_again(monkeypatch):
    given = Settings(model="m", api_keys="k", port=9000, max_queue=3, _env_file=None)  # pyright: ignore[reportCallIssue]
    for part in given.environment():
        for name, value in part.items():
            monkeypatch.setenv(name, value)
    assert load_settings(_env_file=None) == given
