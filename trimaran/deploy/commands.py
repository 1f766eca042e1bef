"""``trimaran deploy``: one subcommand for each platform."""

from __future__ import annotations

import click

from trimaran.deploy.modal import modal
from trimaran.deploy.render import render
from trimaran.deploy.runpod import runpod


@click.group(epilog="Example: trimaran deploy render --name chat --image docker.io/me/trimaran:cpu --dry-run")
def deploy() -> None:
    """Create or update a service in a cloud."""


deploy.add_command(modal)
deploy.add_command(render)
deploy.add_command(runpod)
