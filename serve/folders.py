"""Where things are kept from one run to the next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def default_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """``trimaran`` in the user's cache folder.

    Raises:
        RuntimeError: the user has no home.
    """
    given = environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path is to be ignored.
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "trimaran"
