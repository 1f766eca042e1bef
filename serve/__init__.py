"""Trimaran's container half: one FastAPI app that serves one Hugging Face model.

The public surface is lazy: ``import serve`` loads neither torch nor fastapi.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.api.app import create_app, create_lifecycle
    from serve.settings import Settings, load_settings

__all__ = ["Settings", "create_app", "create_lifecycle", "load_settings"]

_HOMES = {
    "Settings": "serve.settings",
    "create_app": "serve.api.app",
    "create_lifecycle": "serve.api.app",
    "load_settings": "serve.settings",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'serve' has no attribute {name!r}")
