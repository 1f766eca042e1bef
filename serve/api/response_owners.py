"""Whose stored responses are whose at a gateway: its remote knows one key, the gateway's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from serve.errors import PreviousResponseNotFound, ResponseNotFound

MAX_RESPONSES = 20_000
"""As many ids are remembered; the oldest are forgotten first."""

MAX_HEAD_BYTES = 4 * 2**20
"""A stream whose first event is longer than this is not looked into any further."""


class ResponseOwners:
    """Remembers which caller's request made which response.  Used on the event loop alone.

    Args:
        keeps_apart: Else there is one caller only, and every id may pass.
    """

    def __init__(self, *, keeps_apart: bool) -> None:
        self._keeps_apart = keeps_apart
        self._owners: OrderedDict[str, str] = OrderedDict()

    def check(self, caller: str, response_id: str) -> None:
        """Raise ``ResponseNotFound`` unless this gateway got the response for ``caller``."""
        if not self._owns(caller, response_id):
            raise ResponseNotFound(f"there is no response {response_id[:64]!r} here, or not any more")

    def check_previous(self, caller: str, response_id: Any) -> None:
        """Raise ``PreviousResponseNotFound`` unless there is none, or it is one of ``caller``'s."""
        if isinstance(response_id, str) and not self._owns(caller, response_id):
            raise PreviousResponseNotFound(
                f"previous_response_id: this gateway got no response {response_id[:64]!r} for you; "
                "send the whole conversation as input",
                param="previous_response_id",
            )

    def _owns(self, caller: str, response_id: str) -> bool:
        return not self._keeps_apart or self._owners.get(response_id) == caller

    def watch(self, caller: str) -> Callable[[bytes], None]:
        """What is to be called with an answer's body, piece by piece: notes the response in it as ``caller``'s."""
        head = bytearray()
        is_done = not self._keeps_apart

        def see(piece: bytes) -> None:
            nonlocal is_done
            if is_done:
                return
            head.extend(piece)
            found = _response_id(bytes(head))
            is_done = found is not None or len(head) > MAX_HEAD_BYTES
            if found is not None:
                self._owners[found] = caller
                if len(self._owners) > MAX_RESPONSES:
                    self._owners.popitem(last=False)

        return see


def _response_id(body: bytes) -> str | None:
    """The id in a whole response, or in the first event of a stream that has one."""
    if body.lstrip().startswith(b"{"):
        return _id_of(body)
    complete, _, _ = body.rpartition(b"\n")
    for line in complete.split(b"\n"):
        if line.startswith(b"data:") and (found := _id_of(line.removeprefix(b"data:").strip())):
            return found
    return None


def _id_of(text: bytes) -> str | None:
    try:
        value: Any = from_json(text)
        value = value.get("response", value)
        return value["id"] if isinstance(value["id"], str) else None
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
