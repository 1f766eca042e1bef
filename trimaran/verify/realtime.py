"""The check of the WebSocket ``/v1/realtime/chat``, where the server has one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from trimaran.verify.answers import PROMPT, SAME_CHARS, STREAM_TOKENS
from trimaran.verify.outcome import Outcome, failed, passed, skipped

if TYPE_CHECKING:
    from trimaran.verify.target import Stream, Target

NAME = "realtime"
PATH = "/v1/realtime/chat"


def check_realtime(target: Target, stream: Stream) -> Outcome:
    """A turn comes whole and says what the same stream says, a ping is answered, a wrong key is refused."""
    if target.is_queue:
        return skipped(NAME, "RunPod's queue passes no WebSocket")
    try:
        with _connected(target, target.key) as socket:
            defect = _turn_defect(target, socket, stream)
    except InvalidStatus as error:
        return _refused(target, error.response.status_code)
    except (OSError, ValueError, WebSocketException) as error:
        return failed(NAME, f"{PATH} broke off: {type(error).__name__}: {error}")
    if defect:
        return failed(NAME, defect)
    if target.key and (opened := _opens(target, target.key + "x")):
        return failed(NAME, f"{PATH} opens with a wrong key{opened}")
    return passed(NAME, "a turn on the WebSocket is whole, a ping is answered")


def _connected(target: Target, key: str) -> ClientConnection:
    address = "ws" + target.url.removeprefix("http") + PATH
    return connect(
        address, additional_headers=target.headers(key), open_timeout=target.timeout_s, close_timeout=1, proxy=None
    )


def _turn_defect(target: Target, socket: ClientConnection, stream: Stream) -> str:
    socket.send(json.dumps(target.chat(PROMPT, STREAM_TOKENS)))
    text = ""
    while (message := _next(target, socket)).get("type") != "done":
        if "error" in message:
            return f"{PATH} answered a turn with an error: {message['error']}"
        deltas: list[dict[str, Any]] = [choice.get("delta") or {} for choice in message.get("choices") or ()]
        text += "".join(delta.get("content") or "" for delta in deltas)
    if text[:SAME_CHARS] != stream.text[:SAME_CHARS]:
        return f"the same greedy request begins {text[:40]!r} on {PATH}, {stream.text[:40]!r} streamed"
    socket.send('{"type": "ping"}')
    answer = _next(target, socket)
    return "" if answer.get("type") == "pong" else f"{PATH} answered a ping with {str(answer)[:80]}"


def _next(target: Target, socket: ClientConnection) -> dict[str, Any]:
    message: Any = json.loads(socket.recv(target.timeout_s))
    return message if isinstance(message, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _opens(target: Target, key: str) -> str:
    try:
        with _connected(target, key):
            return "."
    except (OSError, WebSocketException):
        return ""


def _refused(target: Target, status: int) -> Outcome:
    """A server of ours has it, unless it is a gateway; RunPod's edge may not pass it, and others need not have it."""
    answer = target.ask("GET", "/version")
    try:
        engine = answer.json()["engine"]
    except (ValueError, KeyError, TypeError):
        engine = None
    if target.is_runpod or engine in (None, "remote"):
        return skipped(NAME, f"no WebSocket here: {PATH} says {status}")
    return failed(
        NAME,
        f"{PATH} says {status}, and the server has it: a proxy in front does not pass WebSockets (the headers Upgrade "
        "and Connection)",
    )
