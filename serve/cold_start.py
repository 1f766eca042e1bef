"""The phases of a cold start: what a start spends its seconds on."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager

from serve.errors import ConfigError, ModelLoadError, ServeError
from serve.observe import process_age_s

logger = logging.getLogger(__name__)


class ColdStart:
    """Times the parts of one start, from the process's birth, or from the moment it was restored from a snapshot."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {"process_start": process_age_s()}
        self.current: str | None = None
        self.weights: tuple[str, int] | None = None
        """Where the weights were found (``local``, ``cache`` or ``hub``), and how many bytes they are."""
        self._began = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Time one part."""
        self.current, began = name, time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.phases[name] = round(seconds, 4)
            self.current = None
            logger.info("Phase %s: %.2f s", name, seconds, extra={"phase": name, "seconds": round(seconds, 4)})

    def age_s(self) -> float:
        """Seconds since the process was born, or came out of the snapshot."""
        return time.perf_counter() - self._began + self.phases["process_start"]

    def restored(self) -> None:
        """The process comes out of a snapshot: count anew, and keep what was done before it as ``prepare_*``."""
        self.phases = {f"prepare_{name}": seconds for name, seconds in self.phases.items()} | {"process_start": 0.0}
        self._began = time.perf_counter()

    def end(self) -> float:
        """Everything is loaded: note and return the total."""
        self.phases["total"] = round(time.perf_counter() - self._began + self.phases["process_start"], 4)
        return self.phases["total"]


@contextmanager
def without_garbage_collection() -> Generator[None]:
    """Collections during the imports stop the event loop for up to 100 ms each, and find next to nothing.

    What was loaded is then left out of all later collections, which makes these short.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def load_failure(error: BaseException) -> ServeError:
    """What callers are told of a load that ended with ``error``; the log is told here."""
    if isinstance(error, ConfigError | ModelLoadError):
        logger.error("The model cannot be served: %s", error.message)
        return error
    logger.error("The model cannot be served", exc_info=error)
    return ModelLoadError(f"{type(error).__name__}: {error}")
