"""``python -m serve.healthcheck``: status 0 when this container's server says that it lives, for HEALTHCHECK.

Standard library only: it runs every half minute beside the model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import closing
from http.client import HTTPConnection, HTTPException

TIMEOUT_S = 4.0
"""Below the Dockerfile's own limit, so that the reason can still be told."""

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - compared with, not bound


def address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Where the server listens, by the same variables that it reads.

    Raises:
        ValueError: the port is no number.
    """
    host = environ.get("SERVE_HOST", "").strip("[]")
    port = environ.get("SERVE_PORT") or environ.get("PORT") or "8000"
    return EVERYWHERE.get(host, host), int(port)


def main() -> int:
    """Ask ``/health``; 0 is healthy, 1 is not."""
    try:
        host, port = address(os.environ)
        with closing(HTTPConnection(host, port, timeout=TIMEOUT_S)) as connection:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            sys.stdout.write(f"{answer.status} {answer.read(500).decode(errors='replace')}\n")
    except (OSError, HTTPException, ValueError) as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    raise SystemExit(main())
