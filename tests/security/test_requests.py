"""Requests that have broken other servers: each is refused by name, and costs next to nothing."""

from __future__ import annotations

import json
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attack import COMPLETIONS, OWN, Target, only_here

HUGE = 10**12
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
QUICK_S = 1.0 if OWN else 10.0

REFUSED: dict[str, dict[str, Any]] = {
    "hundred million choices": {"n": 10**8},  # CVE-2026-34756
    "more tokens than there are": {"max_tokens": HUGE},
    "negative tokens": {"max_tokens": -5},
    "more tokens at least than at most": {"min_tokens": 10**9},  # CVE-2026-114051
    "no messages": {"messages": []},
    "unknown role": {"messages": [{"role": "root", "content": "a"}]},
    "negative top_p": {"top_p": -1},
    "temperature beyond floats": {"temperature": 10**400},
    "a template's arguments": {"chat_template_kwargs": {"tokenize": True}},  # CVE-2025-62426
    "the model's own tokens": {"chat_template_kwargs": {"bos_token": "<|im_start|>"}},
    "a template in the arguments": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    "a bias outside the vocabulary": {"logit_bias": {str(2**40): 1}},
    "a bias that is no token": {"logit_bias": {"it's": 1}},
    "all log-probabilities": {"logprobs": True, "top_logprobs": 10**6},
    "a million stops": {"stop": ["a"] * 10**5},
    "an empty stop": {"stop": [""]},
    "an unknown response format": {"response_format": {"type": "yaml"}},
    "a schema that is none": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "y"}}},
    "a schema of an unknown type": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    },  # CVE-2026-105757
    "a tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "a hundred thousand tools": {"tools": [TOOL] * 10**4},
    "another model": {"model": "../../etc/passwd"},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_hostile_field_is_refused_at_once(target: Target, name: str, stream: bool) -> None:
    fields = REFUSED[name]
    body = json.dumps({**target.chat(), "stream": stream, **fields})
    began = time.monotonic()
    answer = target.client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert time.monotonic() - began < QUICK_S
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\x00" * 1000,
        b'{"model":"\xff"}',
        b'{"a":1' + b"0" * 100_000 + b"}",
        b"null",
    ],
    ids=["arrays", "objects", "zeros", "no UTF-8", "digits", "null"],
)
def test_hostile_json_is_refused_at_once(target: Target, body: bytes) -> None:
    began = time.monotonic()
    answer = target.client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert time.monotonic() - began < QUICK_S


def test_template_of_a_request_is_never_rendered(target: Target) -> None:
    """CVE-2026-115911: an endless template; CVE-2025-62426: another one than the model's."""
    endless = "{% for i in range(10**9) %}x{% endfor %}"
    began = time.monotonic()
    answer = target.client.post(COMPLETIONS, json=target.chat("{{ 7 * 191 }}", chat_template=endless))
    assert time.monotonic() - began < QUICK_S
    assert answer.status_code in {200, 400}
    assert "1337" not in answer.text


def test_prompt_of_many_megabytes_is_refused_without_being_kept(target: Target) -> None:
    """64 MiB, which took a peer's process 4.8 GB and a minute."""
    before = target.peak_kb() if OWN else 0
    answer = target.client.post(COMPLETIONS, json=target.chat("a" * 64 * 2**20))
    assert answer.status_code == 413
    if OWN:
        assert target.peak_kb() - before < 40 * 1024


def test_media_beyond_the_limit_is_refused_before_it_is_decoded(target: Target) -> None:
    """CVE-2026-100650."""
    before = target.peak_kb() if OWN else 0
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 64 * 2**20}}
    assert target.client.post(COMPLETIONS, json=target.chat([image])).status_code == 413
    if OWN:
        assert target.peak_kb() - before < 40 * 1024


def test_prompt_that_does_not_fit_is_refused(target: Target) -> None:
    answer = target.client.post(COMPLETIONS, json=target.chat("word " * 100_000))
    assert answer.status_code in {400, 413}


@contextmanager
def canary() -> Iterator[tuple[int, list[bytes]]]:
    """A listener that nobody should call: its port, and who did."""
    calls: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        is_over = threading.Event()

        def listen() -> None:
            while not is_over.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(1)
                    calls.append(connection.recv(1000))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield listener.getsockname()[1], calls
        finally:
            is_over.set()
            thread.join()


def test_addresses_in_a_request_are_never_fetched(target: Target) -> None:
    """CVE-2026-24779, CVE-2026-25960: the canary would be called from the server's own network."""
    with canary() as (port, calls):
        for url in (
            f"http://127.0.0.1:{port}/a",
            f"http://ok.test\\@127.0.0.1:{port}/a",
            f"http://[::ffff:127.0.0.1]:{port}/a",
            f"http://0x7f000001:{port}/a",
            "http://169.254.169.254/latest/meta-data",
            "file:///etc/passwd",
        ):
            for part in (
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "video_url", "video_url": {"url": url}},
                {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            ):
                answer = target.client.post(COMPLETIONS, json=target.chat([part]))
                assert answer.status_code == 400, answer.text
                assert "root:" not in answer.text
        assert target.client.post(COMPLETIONS, json=target.chat(f"http://127.0.0.1:{port}/b")).status_code == 200
        time.sleep(0.3)
        assert calls == []


class Touch:
    """Unpickled, this makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize(
    "kind", ["application/vnd.bentoml+pickle", "application/octet-stream", "application/x-python-pickle", "text/plain"]
)
def test_pickle_is_never_opened(target: Target, tmp_path: Path, kind: str) -> None:
    """CVE-2024-2912, CVE-2025-27520, CVE-2025-32375."""
    file = tmp_path / "touched"
    answer = target.client.post(COMPLETIONS, content=pickle.dumps(Touch(file)), headers={"content-type": kind})
    assert answer.status_code == 415
    assert not file.exists()


@only_here
def test_grammars_of_many_schemas_fill_nothing(target: Target, tmp_path: Path) -> None:
    """CVE-2025-29770: a cache of grammars that grows with every schema."""

    def ask(number: int) -> None:
        schema = {"type": "object", "properties": {f"key{number}": {"type": "integer"}}, "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": f"s{number}", "schema": schema}}
        assert target.client.post(COMPLETIONS, json=target.chat("{}", response_format=form)).status_code == 200

    for number in range(40):
        ask(number)
    before = target.peak_kb()
    for number in range(40, 200):
        ask(number)
    assert target.peak_kb() - before < 24 * 1024


def test_text_that_looks_like_many_calls_is_read_in_time(target: Target) -> None:
    """CVE-2025-71379: a tool parser whose time explodes."""
    began = time.monotonic()
    for text in (
        "<tool_call>" * 300,
        '<tool_call>[{"a"=1,' * 200,
        "[" + '"a"=1,' * 500,
        "<tool_call>{" * 250 + "}" * 250,
    ):
        for stream in (False, True):
            body = target.chat(text, tools=[TOOL], stream=stream) | {"max_tokens": 2000 if OWN else 32}
            assert target.client.post(COMPLETIONS, json=body).status_code in {200, 400}
    assert time.monotonic() - began < (20 if OWN else 120)


@pytest.mark.parametrize("ending", [b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", b""])
def test_two_lengths_smuggle_nothing(target: Target, ending: bytes) -> None:
    """Length and chunks together: the second request must not be read as one of ours."""
    if target.url.startswith("https"):
        pytest.skip("raw bytes are sent to plain HTTP only")
    with socket.create_connection(target.address, timeout=10) as client:
        client.sendall(
            b"POST /v1/models HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + ending
        )
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    assert b"HTTP/1.1 200" not in answer


@only_here
def test_request_id_writes_no_line_of_its_own_into_the_log(target: Target) -> None:
    for name in ("a\\nb", "x" * 5000, "id level=ERROR", "\x1b[31m"):
        target.client.get("/v1/models", headers=[(b"x-request-id", name.encode("latin-1"))])
    target.client.get("/v1/%0aforged%20line")
    assert "\x1b" not in target.process.log
    assert not any(line.startswith("forged") for line in target.process.log.splitlines())
