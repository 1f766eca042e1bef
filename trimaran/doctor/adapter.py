"""What Modal's adapter would refuse of its own knobs: its functions are asked, and its file is not run."""

from __future__ import annotations

import ast
import re
from typing import Any

from serve.errors import ServeError
from serve.knobs import Knobs
from trimaran.doctor.finding import Finding, Findings, Situation
from trimaran.doctor.setup import modal_knobs
from trimaran.platforms.modal.client import ADAPTER

WANTED = frozenset({"refuse", "scaling", "choose_snapshot", "hardware"})
BATCH = 64
"""As the adapter takes it where no setting says how many requests run at once."""


def knobs(situation: Situation) -> Findings:
    """Values that are no numbers, no choices, or do not go together."""
    table = modal_knobs() if situation.platform == "modal" else {}
    if not table:
        return
    found = _functions()
    settings, has_gpu = situation.settings, bool(situation.gpus)
    stored = situation.need.stored_bytes if situation.need else 0
    try:
        given = Knobs("SERVE_MODAL_", table)
        plan = found["scaling"](given, settings, given.choice("PRIMITIVE", "web", "server"), BATCH)
        del plan
        snapshot = found["choose_snapshot"](given, _Placement(), has_gpu)
        found["hardware"](given, list(situation.gpus), stored, snapshot)
    except (ServeError, _Refused) as error:
        message = str(error).removeprefix("Not deployed: ")
        variable = re.match(r"SERVE_\w+", message)
        if variable and variable[0].removeprefix("SERVE_MODAL_") in table:  # an unknown one has a finding of its own
            what, _, mend = message.partition(": ")
            yield Finding("wrong-setting", what, "The deploy would be refused.", mend or f"unset {variable[0]}")


class _Refused(Exception):
    """What the adapter ends the deploy with."""


class _Placement:
    """A model whose snapshot would pay."""

    gains_from_snapshot = True


def _functions() -> dict[str, Any]:
    """The adapter's own functions that plan without calling anybody."""
    tree = ast.parse(ADAPTER.read_text(encoding="utf-8"))
    body: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in WANTED]
    names: dict[str, Any] = {"Any": Any, "re": re, "PREFIX": "SERVE_MODAL_", "SimpleNamespace": dict, "NoReturn": None}
    exec(compile(ast.Module(body=body, type_ignores=[]), str(ADAPTER), "exec"), names)  # noqa: S102 - of this project

    def refuse(reason: str) -> None:
        raise _Refused(reason)

    names["refuse"] = refuse
    return names
