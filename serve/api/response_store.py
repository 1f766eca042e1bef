"""Responses that are kept for a while, in memory, for their own caller alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.api.schemas.response_resource import Response
from serve.api.schemas.responses import Item
from serve.errors import PreviousResponseNotFound, ResponseNotFound


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that has ended.

    ``input_items`` are what it was asked with; ``history`` is the whole conversation, its own output included;
    ``num_bytes`` are those of everything, as JSON.
    """

    response: Response
    input_items: Sequence[dict[str, Any]]
    history: Sequence[Item]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class RunningResponse:
    """A response that goes on in the background."""

    body: Callable[[], Response]
    input_items: Sequence[dict[str, Any]]
    cancel: Callable[[], Response]


@dataclass(slots=True)
class _Shelf:
    """What one caller has."""

    ended: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict[str, StoredResponse])
    running: dict[str, RunningResponse] = field(default_factory=dict[str, RunningResponse])
    num_bytes: int = 0

    def drop_oldest(self) -> int:
        """Forget the response that ended first; its bytes."""
        _, oldest = self.ended.popitem(last=False)
        self.num_bytes -= oldest.num_bytes
        return oldest.num_bytes


MAX_FULL_SHELVES = 8
"""All callers together have the bytes that so many may have alone: an issuer of tokens knows any number of them."""


class ResponseStore:
    """The newest responses of each caller.  Used on the event loop alone.

    Args:
        max_responses: Kept for each caller; 0 keeps none.
        max_bytes: Kept for each caller.  A conversation's beginning counts again with each response that goes on
            from it, although it is there once.  For all together see :data:`MAX_FULL_SHELVES`: who has stored nothing
            for longest loses responses first.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()
        self._num_bytes = 0

    @property
    def keeps_any(self) -> bool:
        """Whether responses are stored here at all."""
        return self._max_responses > 0

    def put(self, caller: str, stored: StoredResponse) -> None:
        """Keep a response that has ended, in place of the oldest ones where there is no room."""
        shelf = self._shelves.setdefault(caller, _Shelf())
        self._shelves.move_to_end(caller)
        shelf.running.pop(stored.response.id, None)
        shelf.ended[stored.response.id] = stored
        shelf.num_bytes += stored.num_bytes
        self._num_bytes += stored.num_bytes
        while shelf.ended and (len(shelf.ended) > self._max_responses or shelf.num_bytes > self._max_bytes):
            self._num_bytes -= shelf.drop_oldest()
        while self._num_bytes > MAX_FULL_SHELVES * self._max_bytes:
            self._make_room()

    def _make_room(self) -> None:
        name, shelf = next((name, shelf) for name, shelf in self._shelves.items() if shelf.ended)
        self._num_bytes -= shelf.drop_oldest()
        if not shelf.ended and not shelf.running:
            del self._shelves[name]

    def start(self, caller: str, response_id: str, running: RunningResponse) -> None:
        """Note a response that runs in the background."""
        self._shelves.setdefault(caller, _Shelf()).running[response_id] = running

    def get(self, caller: str, response_id: str) -> StoredResponse | RunningResponse:
        """A response of this caller.

        Raises:
            ResponseNotFound: this caller has none of this id (any more).
        """
        shelf = self._shelves.get(caller, _Shelf())
        found = shelf.ended.get(response_id) or shelf.running.get(response_id)
        if found is None:
            raise ResponseNotFound(f"there is no response {response_id[:64]!r} here, or not any more")
        return found

    def previous(self, caller: str, response_id: str) -> StoredResponse:
        """A response to go on from.

        Raises:
            PreviousResponseNotFound: this caller has none of this id (any more), or it has not ended.
        """
        found = self._shelves.get(caller, _Shelf()).ended.get(response_id)
        if found is None:
            raise PreviousResponseNotFound(
                f"previous_response_id: there is no response {response_id[:64]!r} here, or not any more; "
                "send the whole conversation as input",
                param="previous_response_id",
            )
        return found

    def delete(self, caller: str, response_id: str) -> None:
        """Forget a response; one that runs is cancelled.

        Raises:
            ResponseNotFound: this caller has none of this id (any more).
        """
        found = self.get(caller, response_id)
        if isinstance(found, RunningResponse):
            found.cancel()
        shelf = self._shelves[caller]
        if ended := shelf.ended.pop(response_id, None):
            shelf.num_bytes -= ended.num_bytes
            self._num_bytes -= ended.num_bytes
