"""``trimaran emulate``: a platform's control plane on this machine."""

from __future__ import annotations

import click

from trimaran.emulate.modal.command import modal
from trimaran.emulate.render.command import render
from trimaran.emulate.runpod.command import runpod


@click.group(epilog="Example: SERVE_ENGINE=echo trimaran emulate runpod")
def emulate() -> None:
    """Run a platform's control plane on this machine, and the real worker or container under it."""


emulate.add_command(modal)
emulate.add_command(render)
emulate.add_command(runpod)
