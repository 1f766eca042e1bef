"""``trimaran emulate modal``."""

from __future__ import annotations

import click


@click.command(epilog="Example: trimaran emulate modal ./my-model --ask 'What is a trimaran?'")
@click.option("--ask", "question", metavar="TEXT", help="Stream the answer to TEXT and end, instead of serving.")
@click.argument("model", required=False)
def modal(model: str | None, question: str | None) -> None:
    """Deploy deploy/modal/app.py with the real `modal deploy` to a stand-in for Modal, and serve it.

    MODEL is a folder.  Default: SERVE_MODEL, else the demo model.  Settings are SERVE_* variables, as for Modal
    itself.  Prints what Modal would create.  Nothing leaves this machine; there is no GPU, no image is built, and
    of snapshots only the order of calls is real.
    """
    try:
        from trimaran.emulate.modal import session  # noqa: PLC0415
    except ImportError as error:
        raise click.ClickException(f"{error}. Run: pip install -e '.[modal]'") from error
    session.run(model, question)
