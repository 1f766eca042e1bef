from __future__ import annotations

import socket
import threading

import pytest
from support import running

from serve import healthcheck


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({}, ("127.0.0.1", 8000)),
        ({"SERVE_HOST": "0.0.0.0", "PORT": "10000"}, ("127.0.0.1", 10000)),  # noqa: S104
        ({"SERVE_HOST": "::", "PORT": "10000", "SERVE_PORT": "9000"}, ("::1", 9000)),
        ({"SERVE_HOST": "[::1]", "SERVE_PORT": ""}, ("::1", 8000)),
        ({"SERVE_HOST": "10.0.0.7"}, ("10.0.0.7", 8000)),
    ],
)
def test_healthcheck_asks_where_the_server_listens(environ: dict[str, str], address: tuple[str, int]) -> None:
    assert healthcheck.address(environ) == address


def check(monkeypatch: pytest.MonkeyPatch, port: object) -> int:
    monkeypatch.setenv("SERVE_PORT", str(port))
    return healthcheck.main()


def test_healthcheck_is_0_for_a_live_server_only(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with running() as server:
        port = server.url.rpartition(":")[2]
        assert check(monkeypatch, port) == 0
    assert check(monkeypatch, port) == 1
    assert check(monkeypatch, "eighty") == 1
    assert "ConnectionRefusedError" in capsys.readouterr().out


def test_healthcheck_gives_up_on_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthcheck, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        assert check(monkeypatch, deaf.getsockname()[1]) == 1


def test_healthcheck_refuses_another_status(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 503 Dead\r\ncontent-length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert check(monkeypatch, server.getsockname()[1]) == 1
        thread.join()
