"""What an answer and all chunks of a stream have in common."""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass
from typing import Any

from serve.api.health import package_version
from serve.settings import Settings


@dataclass(frozen=True, slots=True)
class Heading:
    """Identifies one answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, settings: Settings) -> Heading:
        """For an answer that begins now; its id begins with ``prefix``."""
        name = settings.served_name
        return cls(prefix + uuid.uuid4().hex, int(time.time()), name, fingerprint(name))

    def fields(self) -> dict[str, Any]:
        """By their names on the wire."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def fingerprint(name: str) -> str:
    """Names what computed an answer: it changes with the model's name and with this server's version."""
    return "fp_" + hashlib.sha256(f"{package_version()} {name}".encode()).hexdigest()[:10]
