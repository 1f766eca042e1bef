"""Trimaran's container half: one FastAPI app that serves one Hugging Face model.

The public surface is lazy: ``import serve`` loads neither torch nor fastapi.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.api.app import create_app
    from serve.settings import Settings

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    if name == "Settings":
        from serve.settings import Settings  # noqa: PLC0415

        return Settings
    if name == "create_app":
        from serve.api.app import create_app  # noqa: PLC0415

        return create_app
    raise AttributeError(f"module 'serve' has no attribute {name!r}")
