"""``python -m serve.bake MODEL [REVISION]``: bring a model into the Hub's cache, whole, while an image is built.

The image's weights are a layer below the code, so this imports only what finds and verifies files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from serve.errors import ServeError
from serve.weights import fetch_weights, locate


def main(argv: Sequence[str] | None = None) -> int:
    """Bring and verify the model; return the exit status (1: it cannot be served, and why)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write("usage: python -m serve.bake MODEL [REVISION]\n")
        return 2
    model, revision = arguments[0], arguments[1] if len(arguments) > 1 else ""
    try:
        source = fetch_weights(locate(model, revision or None))
    except ServeError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    sys.stderr.write(f"{model}: {source.num_bytes} bytes of weights, revision {source.revision}, in {source.folder}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
