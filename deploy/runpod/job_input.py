"""What a job asks for: the inputs that are accepted, as one request to the app."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import InvalidRequest

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"

BATCH_KEYS = frozenset({"batch_size", "max_batch_size", "min_batch_size", "batch_size_growth_factor"})
"""How worker-vllm was told to group tokens.  Here whatever has arrived goes out, so they have no meaning."""

NATIVE_KEYS = BATCH_KEYS | {"messages", "prompt", "sampling_params", "stream", "apply_chat_template"}
"""Beside ``messages`` or ``prompt``, any other key makes the input a plain OpenAI request."""

ACCEPTED = (
    'send {"openai_route": "/v1/...", "openai_input": {...}}, {"route": "/...", "method": "...", "body": {...}}, '
    '{"messages" or "prompt": ..., "sampling_params": {...}, "stream": ...}, or a chat-completion request'
)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A job's request to the app.

    ``is_native`` asks for numbered chunks of text in place of what the route answers; ``is_stream`` is what the body
    asks for.
    """

    method: str
    target: str
    body: Any = None
    is_native: bool = False

    @property
    def is_stream(self) -> bool:
        """Whether the body asks for a stream."""
        return isinstance(self.body, dict) and self.body.get("stream") is True

    def encoded_body(self) -> bytes:
        """The body as JSON; empty without one."""
        return b"" if self.body is None else json.dumps(self.body, ensure_ascii=False).encode("utf-8", "surrogatepass")


def parse(job_input: Any, model: str) -> JobRequest:
    """Read a job's input; ``model`` is filled in where its own shapes leave the model out.

    Raises:
        InvalidRequest: it has none of the accepted shapes; names the field.
    """
    if not isinstance(job_input, dict):
        raise InvalidRequest(f"input is {_kind(job_input)}, not an object; {ACCEPTED}", param="input")
    given: dict[str, Any] = job_input
    if "openai_route" in given or "openai_input" in given:
        return _openai(given)
    if "route" in given:
        body = given.get("body")
        return JobRequest(_method(given, "GET" if body is None else "POST"), _target(given["route"], "route"), body)
    if "messages" in given or "prompt" in given:
        return _native(given, model) if given.keys() <= NATIVE_KEYS else _plain(given, model)
    named = f"has only {', '.join(sorted(map(str, given))[:5])}" if given else "is empty"
    raise InvalidRequest(f"input {named}; {ACCEPTED}", param="input")


def _openai(given: Mapping[str, Any]) -> JobRequest:
    target, body = _target(given.get("openai_route") or CHAT, "openai_route"), given.get("openai_input")
    if not body and target.startswith(MODELS):  # some clients send {} with a GET
        body = None
    return JobRequest(_method(given, "GET" if body is None else "POST"), target, body)


def _native(given: Mapping[str, Any], model: str) -> JobRequest:
    params = given.get("sampling_params") or {}
    if not isinstance(params, dict):
        raise InvalidRequest(f"input.sampling_params is {_kind(params)}; send an object", param="input.sampling_params")
    body: dict[str, Any] = {"model": model, **params}
    if given.get("stream"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return JobRequest("POST", _complete(body, given), body, is_native=True)


def _plain(given: Mapping[str, Any], model: str) -> JobRequest:
    own = BATCH_KEYS | {"messages", "prompt", "sampling_params", "apply_chat_template"}
    params = given.get("sampling_params") or {}
    body = {"model": model, **params, **{name: value for name, value in given.items() if name not in own}}
    return JobRequest("POST", _complete(body, given), body)


def _complete(body: dict[str, Any], given: Mapping[str, Any]) -> str:
    """Put the prompt into ``body``; return the route that takes it."""
    if "messages" in given:
        body["messages"] = given["messages"]
        return CHAT
    if given.get("apply_chat_template"):
        body["messages"] = [{"role": "user", "content": given["prompt"]}]
        return CHAT
    body["prompt"] = given["prompt"]
    return COMPLETIONS


def _method(given: Mapping[str, Any], default: str) -> str:
    method = given.get("method") or default
    if not isinstance(method, str) or method.upper() not in METHODS:
        raise InvalidRequest(f"input.method is {method!r:.60}; send one of {', '.join(METHODS)}", param="input.method")
    return method.upper()


def _target(route: Any, name: str) -> str:
    if not isinstance(route, str) or "://" in route or "\\" in route or not route.isprintable() or " " in route:
        raise InvalidRequest(f"input.{name} is {route!r:.60}; send a path such as {CHAT}", param=f"input.{name}")
    return route if route.startswith("/") else f"/{route}"


def _kind(value: Any) -> str:
    kinds = {str: "a string", list: "an array", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), "an object")
