"""Says on standard error what a command waits for, when that takes longer than a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

import click

FIRST_S, NEXT_S = 1.0, 5.0


@contextmanager
def waiting(what: str) -> Generator[None]:
    """``Asking Render ... 6 s`` after one second, and every five; one line each, so that logs of CI can be read."""
    over = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        pause = FIRST_S
        while not over.wait(pause):
            click.echo(f"{what} ... {time.monotonic() - began:.0f} s", err=True)
            pause = NEXT_S

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
