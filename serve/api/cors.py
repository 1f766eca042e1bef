"""Which web pages may read our answers: none, unless the operator names their origins."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

LIMITED = ("requests", "tokens", "tokens-day", "usd-day")
LIMITS = [f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset") for what in LIMITED]
READABLE = (
    "x-request-id", "request-id", "retry-after", "server-timing", "www-authenticate", "x-ignored-parameters", *LIMITS,
)  # fmt: skip
PREFLIGHT_S = 600


def cors(origins: Sequence[str]) -> list[Middleware]:
    """Answers the preflights of ``origins`` and lets their pages read; nothing for no origin.

    Credentials are never allowed: a key travels in a header that the page sets itself, so a foreign page that a browser
    would send cookies or passwords for gains nothing.  Any header may be sent: the official clients send a dozen about
    themselves, and no header is read as more than its sender's own words.
    """
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=list(READABLE),
            allow_credentials=False,
            max_age=PREFLIGHT_S,
        )
    ]
