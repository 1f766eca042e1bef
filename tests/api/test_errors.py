"""Every failure has OpenAI's error body, and leaves the connection usable."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import support
from support import chat, openai_error, serving

from serve.api.schemas.chat import ChatCompletionRequest
from serve.api.schemas.sampling import REFUSED_EXTRAS
from serve.engine.base import TokenStream
from serve.engine.echo import EchoEngine
from serve.types import GenerationRequest

COMPLETIONS = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


class Connection:
    """One keep-alive connection; fails when the server has closed it."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        self._http.connect()
        self._http.auto_open = 0

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        self._http.request(method, path, body, headers or {}, encode_chunked=isinstance(body, Iterator))
        response = self._http.getresponse()
        return response.status, response.headers, response.read()

    def error(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Status and error of a failing request; a good request then passes on the same connection."""
        status, answered, text = self.send(method, path, body, JSON if headers is None else headers)
        assert answered.get_content_type() == "application/json"
        error = openai_error(json.loads(text))
        assert self.send("POST", COMPLETIONS, json.dumps(chat("good")), JSON)[0] == 200
        return status, error

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def connection(echo: support.Served) -> Iterator[Connection]:
    connection = Connection(echo.port)
    yield connection
    connection.close()


def raw_chat(**fields: str) -> bytes:
    """A request with raw JSON for some fields."""
    known = {"model": '"echo"', "messages": '[{"role":"user","content":"a"}]'}
    return ("{" + ",".join(f'"{name}":{value}' for name, value in {**known, **fields}.items()) + "}").encode()


def user(content: str) -> bytes:
    return raw_chat(messages=f'[{{"role":"user","content":{content}}}]')


BAD_BODIES: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", None),
    "blank": (b"  ", None),
    "cut": (b'{"model":', None),
    "trailing text": (raw_chat() + b"x", None),
    "single quotes": (b"{'model':'echo'}", None),
    "null": (b"null", None),
    "array": (b"[]", None),
    "string": (b'"x"', None),
    "number": (b"5", None),
    "no utf-8": (user('"\xff"').replace("ÿ".encode(), b"\xff"), None),
    "utf-16": (raw_chat().decode().encode("utf-16"), None),
    "nested arrays": (b"[" * 100_000, None),
    "nested objects": (b'{"a":' * 100_000, None),
    "nested and closed": (raw_chat(x="[" * 100_000 + "]" * 100_000), None),
    "lone surrogate": (user(r'"a \ud800 b"'), None),  # case 27
    "lone low surrogate": (user(r'"\udc00"'), None),
    "NaN": (raw_chat(top_p="NaN"), None),
    "Infinity": (raw_chat(top_p="Infinity"), None),
    "1e400": (raw_chat(top_p="1e400"), "top_p"),
    "endless integer": (raw_chat(seed="1" + "0" * 5000), None),
    "integer beyond 64 bits": (raw_chat(seed="1" + "0" * 30), "seed"),
    "no model": (b'{"messages":[{"role":"user","content":"a"}]}', "model"),
    "no messages": (b'{"model":"echo"}', "messages"),
    "no message": (raw_chat(messages="[]"), "messages"),
    "messages a string": (raw_chat(messages='"a"'), "messages"),
    "message a string": (raw_chat(messages='["a"]'), "messages[0]"),
    "unknown role": (raw_chat(messages='[{"role":"robot","content":"a"}]'), "messages[0].role"),
    "no role": (raw_chat(messages='[{"content":"a"}]'), "messages[0].role"),
    "no content": (raw_chat(messages='[{"role":"user"}]'), "messages[0].content"),
    "content a number": (user("5"), "messages[0].content"),
    "content null": (user("null"), "messages[0].content"),
    "part without type": (user('[{"text":"a"}]'), "messages[0].content[0].type"),  # case 19
    "part of unknown type": (user('[{"type":"wat"}]'), "messages[0].content[0].type"),
    "part without text": (user('[{"type":"text"}]'), "messages[0].content[0].text"),
    "image part": (user('[{"type":"text","text":"a"},{"type":"image_url"}]'), "messages[0].content[1]"),  # case 20
    "empty prompt": (user('""'), "messages"),
    "stream a string": (raw_chat(stream='"yes"'), "stream"),
    "stop a number": (raw_chat(stop="5"), "stop"),
    "stop empty": (raw_chat(stop='""'), "stop"),
    "stop with an empty string": (raw_chat(stop='["a",""]'), "stop[1]"),
    "stop too many": (raw_chat(stop='["a","b","c","d","e"]'), "stop"),
    "seed a string": (raw_chat(seed='"x"'), "seed"),  # case 32
    "top_k negative": (raw_chat(top_k="-2"), "top_k"),
    "stream_options alone": (raw_chat(stream_options="{}"), "stream_options"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_errors_of_a_body_name_the_field(connection: Connection, name: str) -> None:
    """Cases 19, 20, 27, 32."""
    body, param = BAD_BODIES[name]

    status, error = connection.error("POST", COMPLETIONS, body)

    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    if param:
        assert param in error["message"]
    assert len(error["message"]) < 500


DECLARED = set(ChatCompletionRequest.model_fields)
UNSUPPORTED = {
    "tools": [{"type": "function", "function": {"name": "f"}}], "functions": [{"name": "f"}],
    "function_call": {"name": "f"}, "modalities": ["audio"], "audio": {}, "web_search_options": {},
    "reasoning_effort": "low", "verbosity": "high", "moderation": {},
    **dict.fromkeys(sorted(REFUSED_EXTRAS.keys() - DECLARED), 7),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_errors_name_an_unsupported_field(connection: Connection, name: str) -> None:
    """Cases 10, 24, 59: refused, never ignored."""
    status, error = connection.error("POST", COMPLETIONS, json.dumps(chat("a", **{name: UNSUPPORTED[name]})))

    assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", name)


@pytest.mark.parametrize(
    "path",
    ["/nope", "/v1", "/v1/chat", "/v1/edits", "//v1/models", "/docs/assets/%00", "/docs/assets/" + "a" * 300],
)
def test_errors_of_an_unknown_path_name_it(connection: Connection, path: str) -> None:
    status, error = connection.error("GET", path)

    assert status == 404
    assert path.replace("%00", "")[:40] in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", COMPLETIONS, "POST"), ("POST", "/v1/models", "GET"), ("DELETE", "/health", "GET"), ("PUT", "/", "GET")],
)
def test_errors_of_a_wrong_method_say_the_right_one(
    connection: Connection, method: str, path: str, allowed: str
) -> None:
    status, headers, text = connection.send(method, path, b"{}", JSON)

    assert status == 405
    assert method in openai_error(json.loads(text))["message"]
    assert allowed in (headers["allow"] or "")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_errors_of_another_media_type_are_415(connection: Connection, kind: str) -> None:
    status, error = connection.error("POST", COMPLETIONS, raw_chat(), {"content-type": kind})

    assert (status, error["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"])
def test_errors_spare_every_kind_of_json(connection: Connection, kind: str) -> None:
    assert connection.send("POST", COMPLETIONS, raw_chat(), {"content-type": kind})[0] == 200


@pytest.fixture(scope="module")
def narrow() -> Iterator[support.Served]:
    """A server for bodies of at most 2048 bytes."""
    with serving(max_body_bytes=2048) as served:
        yield served


@pytest.mark.parametrize("is_chunked", [False, True])
def test_errors_of_a_large_body_are_413(narrow: support.Served, is_chunked: bool) -> None:
    connection = Connection(narrow.port)
    body = json.dumps(chat("x" * 5_000_000)).encode()
    chunks = (body[at : at + 65536] for at in range(0, len(body), 65536))

    status, error = connection.error("POST", COMPLETIONS, chunks if is_chunked else body)

    assert (status, error["code"]) == (413, "request_too_large")
    assert "2048" in error["message"]
    connection.close()


def test_errors_spare_a_body_of_exactly_the_limit(narrow: support.Served) -> None:
    connection = Connection(narrow.port)
    body = json.dumps(chat("a")).encode()

    assert connection.send("POST", COMPLETIONS, body.ljust(2048), JSON)[0] == 200
    assert connection.error("POST", COMPLETIONS, body.ljust(2049))[0] == 413
    connection.close()


def test_errors_of_a_body_beyond_all_measure_come_before_it_is_sent(narrow: support.Served) -> None:
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999999999999\r\n\r\n"
        )
        answer = client.makefile("rb").read().decode()

    assert answer.startswith("HTTP/1.1 413 ")
    assert openai_error(json.loads(answer.partition("\r\n\r\n")[2]))["code"] == "request_too_large"


class BrokenEngine(EchoEngine):
    """Raises what nobody expects for one prompt."""

    def submit(self, request: GenerationRequest) -> TokenStream:
        if request.prompt_token_ids == tuple(b"break"):
            raise KeyError("secret detail")
        return super().submit(request)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_that_nobody_expects_keep_the_connection(stream: bool) -> None:
    """Case 52."""
    with serving(BrokenEngine()) as served:
        connection = Connection(served.port)
        for _ in range(2):
            status, error = connection.error("POST", COMPLETIONS, json.dumps(chat("break", stream=stream)))

            assert (status, error["type"]) == (500, "server_error")
            assert "secret detail" not in error["message"]
        connection.close()


def test_errors_carry_the_request_id(connection: Connection) -> None:
    for wanted, is_kept in (("abc-1.2_3", True), ("a b", False), ("x" * 129, False)):
        _, headers, _ = connection.send("GET", "/nope", headers={"x-request-id": wanted})
        assert (headers["x-request-id"] == wanted) is is_kept
        assert headers["x-request-id"]


@pytest.mark.parametrize("item", ["1", "[]", "{}", '{"role":"user","content":""}', '""'])
def test_errors_of_a_body_with_a_million_values_come_at_once(connection: Connection, item: str) -> None:
    body = b'{"model":"echo","messages":[' + b",".join([item.encode()] * 200_000) + b"]}"

    status, error = connection.error("POST", COMPLETIONS, body)

    assert (status, error["type"]) == (400, "invalid_request_error")
    assert "JSON values" in error["message"]
