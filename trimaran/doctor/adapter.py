"""What Modal's adapter would refuse of its own knobs: its functions are asked, so that no rule is written twice."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from serve.errors import ServeError
from serve.knobs import Knobs
from trimaran.doctor.finding import Finding, Findings, Situation
from trimaran.doctor.setup import modal_knobs
from trimaran.platforms.modal.client import ADAPTER

BATCH = 64
"""As the adapter takes it where no setting says how many requests run at once."""


def knobs(situation: Situation) -> Findings:
    """Values that are no numbers, no choices, or do not go together."""
    table = modal_knobs() if situation.platform == "modal" else {}
    if not table:
        return
    settings, gpus = situation.settings, list(situation.gpus)
    stored = situation.need.stored_bytes if situation.need else 0
    with _without_modal():
        asked = runpy.run_path(str(ADAPTER))
    try:
        given = Knobs(asked["PREFIX"], table)
        asked["scaling"](given, settings, given.choice("PRIMITIVE", "web", "server"), BATCH)
        snapshot = asked["choose_snapshot"](given, _Placement(), bool(gpus))
        asked["hardware"](given, gpus, stored, snapshot)
    except (ServeError, SystemExit) as error:  # the adapter refuses by ending the process
        message = str(error).removeprefix("Not deployed: ")
        variable = re.match(r"SERVE_\w+", message)
        if variable and variable[0].removeprefix(asked["PREFIX"]) in table:  # an unknown one has a finding of its own
            what, _, mend = message.partition(": ")
            yield Finding("wrong-setting", what, "The deploy would be refused.", mend or f"unset {variable[0]}")


class _Placement:
    """A model whose snapshot would pay."""

    gains_from_snapshot = True


class _Nothing(ModuleType):
    """In place of Modal's library: everything is there, and nothing is done."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        is_decorator = len(arguments) == 1 and callable(arguments[0]) and not named
        return arguments[0] if is_decorator else self

    def is_local(self) -> bool:
        """As in a container, where the adapter plans nothing and calls nobody."""
        return False


@contextmanager
def _without_modal() -> Generator[None]:
    before = sys.modules.get("modal")
    sys.modules["modal"] = _Nothing("modal")
    try:
        yield
    finally:
        del sys.modules["modal"]
        if before is not None:
            sys.modules["modal"] = before
