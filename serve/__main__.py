"""``python -m serve``: arguments and environment to settings, then the server."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from serve.errors import ConfigError

if TYPE_CHECKING:
    from serve.settings import Settings


def _parser() -> argparse.ArgumentParser:
    from serve.settings import Settings  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="python -m serve",
        description="Serve one Hugging Face model over an OpenAI-compatible API.",
        epilog="Each option is also an environment variable: --max-batch-size is SERVE_MAX_BATCH_SIZE. "
        "Example: python -m serve --model Qwen/Qwen3-4B --port 8000",
    )
    for name, field in Settings.model_fields.items():
        flag, text = "--" + name.replace("_", "-"), (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, help=text, metavar="BOOL", nargs="?", const="true")
        else:
            parser.add_argument(flag, help=text, metavar=name.rpartition("_")[2].upper())
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; return its exit status (2: a setting is wrong)."""
    from serve.settings import load_settings  # noqa: PLC0415

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:  # as SageMaker starts containers
        del arguments[0]
    try:
        return _serve(load_settings(**given_options(arguments)))
    except ConfigError as error:
        sys.stderr.write(f"{error.message}\n")
        return error.exit_status


def given_options(arguments: Sequence[str]) -> dict[str, str]:
    """The settings that a command line names, as text; a wrong one ends the process with status 2."""
    return {name: value for name, value in vars(_parser().parse_args(list(arguments))).items() if value is not None}


def _serve(settings: Settings) -> int:
    from serve.observe import configure_logging  # noqa: PLC0415
    from serve.server import run  # noqa: PLC0415
    from serve.settings import unknown_variables  # noqa: PLC0415

    configure_logging(settings.log_format, settings.log_level)
    for warning in unknown_variables(os.environ):
        logging.getLogger("serve").warning("%s", warning)
    return run(settings)


def _leave_early(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM before the server handles it: nothing runs yet.  In a container Linux would ignore the signal."""
    del number, frame
    leave(0)


def leave(status: int) -> NoReturn:
    """End the process now: a thread that still imports or copies weights cannot be interrupted."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave_early)  # before the imports that take time
    gc.disable()  # imports leave no garbage, and looking for it again and again costs a tenth of them
    leave(main())
