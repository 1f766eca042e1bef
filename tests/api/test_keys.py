"""A file of keys over HTTP: scopes, names, and changes without a restart."""

from __future__ import annotations

import signal
from pathlib import Path

import httpx2 as httpx
import pytest
from click.testing import CliRunner
from support import chat, eventually, message_error, openai_error, running, serving

from trimaran.cli import main

COMPLETIONS = "/v1/chat/completions"


def new_key(file: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["keys", "new", "--file", str(file), *options])
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def test_scopes_open_what_they_name(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    user, admin = new_key(file, "--name", "app"), new_key(file, "--scope", "admin")
    both = "from-the-environment"
    with serving(api_keys_file=file, api_keys=both) as served, httpx.Client(base_url=served.url) as client:

        def statuses(key: str) -> list[int]:
            head = {"authorization": f"Bearer {key}"}
            return [
                client.post(COMPLETIONS, json=chat("a"), headers=head).status_code,
                *(
                    client.get(path, headers=head).status_code
                    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/health")
                ),
            ]

        assert statuses(user) == [200, 200, 403, 200, 200, 200]
        assert statuses(admin) == [403, 403, 200, 200, 200, 200]
        assert statuses(both) == [200] * 6
        assert statuses("wrong") == [401] * 5 + [200]
        refused = client.get("/metrics", headers={"x-api-key": user})
        error = openai_error(refused.json())
        assert (error["type"], error["code"]) == ("permission_error", "permission_denied")
        assert "the scope admin" in error["message"]
        assert "www-authenticate" not in refused.headers
        refused = client.post("/v1/messages", json={}, headers={"x-api-key": admin})
        assert message_error(refused)["type"] == "permission_error"
        operations = client.get("/openapi.json", headers={"x-api-key": user}).json()["paths"]
        assert operations["/metrics"]["get"]["security"] == [{"HTTPBearer": ["admin"]}, {"APIKeyHeader": ["admin"]}]
        assert {"HTTPBearer": ["inference"]} in operations[COMPLETIONS]["post"]["security"]
        assert {"HTTPBearer": []} in operations["/version"]["get"]["security"]


def test_keys_of_one_name_share_an_allowance(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = [new_key(file, "--name", "app"), new_key(file, "--name", "app"), new_key(file)]
    with (
        serving(api_keys_file=file, limit_requests_per_minute=1) as served,
        httpx.Client(base_url=served.url) as client,
    ):
        found = [client.post(COMPLETIONS, json=chat("a"), headers={"x-api-key": key}).status_code for key in keys]
    assert found == [200, 429, 200]


def test_file_of_keys_is_read_again_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.app.KEYS_CHECKED_S", 0.05)
    file = tmp_path / "keys.json"
    first = new_key(file, "--name", "app")
    with serving(api_keys_file=file) as served, httpx.Client(base_url=served.url) as client:

        def status(key: str) -> int:
            return client.get("/v1/models", headers={"x-api-key": key}).status_code

        assert status(first) == 200
        second = new_key(file, "--name", "app")
        eventually(lambda: status(second) == 200)
        assert status(first) == 200
        listed = CliRunner().invoke(main, ["keys", "list", "--file", str(file)]).output.splitlines()
        done = CliRunner().invoke(main, ["keys", "revoke", "--file", str(file), listed[1].split()[0]])
        assert done.exit_code == 0
        eventually(lambda: status(first) == 401)
        assert status(second) == 200


def test_process_logs_names_of_keys_and_never_starts_with_a_wrong_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "--name", "app")
    environment = {"SERVE_API_KEYS_FILE": str(file), "SERVE_LOG_FORMAT": "json"}
    with running(**environment) as server:
        assert httpx.post(server.url + COMPLETIONS, json=chat("a"), headers={"x-api-key": key}).status_code == 200
        eventually(lambda: '"caller": "app", "key_id": "key-' in server.log)
        assert key not in server.log
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0

    file.write_text("{}")
    with running(**environment) as server:
        assert server.process.wait(20) == 2
        assert "does not hold" in server.log
