"""The waiting queue: callers take turns, and each caller's requests keep their order.  Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from serve.engine.sequence import Sequence

MAX_REMEMBERED = 1024
"""Callers whose last turn is known; one that is forgotten counts as new."""


class FairQueue:
    """Waiting sequences by scope; the next one is of the scope whose turn is longest ago."""

    def __init__(self) -> None:
        self._callers: dict[str, deque[Sequence]] = {}
        """Those who wait."""
        self._turns: dict[str, None] = {}
        """Who had a turn, the last one last."""

    def __iter__(self) -> Iterator[Sequence]:
        for own in self._callers.values():
            yield from own

    def __len__(self) -> int:
        return sum(map(len, self._callers.values()))

    def __bool__(self) -> bool:
        return bool(self._callers)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind its caller's others."""
        self._callers.setdefault(sequence.scope, deque()).append(sequence)

    def pop(self, is_ready: Callable[[Sequence], bool]) -> Sequence | None:
        """The next sequence, if some caller's first one is ready; who never had a turn comes first."""
        newcomers = (scope for scope in self._callers if scope not in self._turns)
        for scope in (*newcomers, *self._turns):
            own = self._callers.get(scope)
            if own and is_ready(own[0]):
                sequence = own.popleft()
                if not own:
                    del self._callers[scope]
                self._remember(scope)
                return sequence
        return None

    def _remember(self, scope: str) -> None:
        self._turns.pop(scope, None)
        self._turns[scope] = None
        if len(self._turns) > MAX_REMEMBERED:
            del self._turns[next(iter(self._turns))]

    def drop_ended(self) -> None:
        """Forget those that have a finish reason."""
        for scope, own in list(self._callers.items()):
            kept = deque(sequence for sequence in own if sequence.finish_reason is None)
            if kept:
                self._callers[scope] = kept
            else:
                del self._callers[scope]
