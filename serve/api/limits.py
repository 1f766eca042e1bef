"""Each caller's allowance at the door: 429 with the seconds to wait, and headers that say what is left."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.auth import OPEN_PATHS
from serve.api.errors import error_response
from serve.errors import RateLimited
from serve.limits import Limiter
from serve.observe import RequestRecord


class Limits:
    """Counts POST requests against their caller's allowance; the rest costs nothing and stays free."""

    def __init__(self, app: ASGIApp, limiter: Limiter) -> None:
        self._app = app
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer 429."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or scope["path"] in OPEN_PATHS
            or self._limiter.allowance.is_unlimited
        ):
            await self._app(scope, receive, send)
            return
        record: RequestRecord = scope["trimaran.record"]
        caller = record.caller or ""

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers(caller).items():
                    headers[name] = value
            await send(message)

        try:
            admission = await Admission.of(self._limiter, record)
        except RateLimited as error:
            record.error_code = error.code
            await error_response(error, scope)(scope, receive, send_with_limits)
            return
        with admission:
            await self._app({**scope, "trimaran.admission": admission}, receive, send_with_limits)

    def _headers(self, caller: str) -> dict[str, str]:
        headers: dict[str, str] = {}
        for left in self._limiter.remaining(caller):
            headers[f"x-ratelimit-limit-{left.kind}"] = number(left.limit)
            headers[f"x-ratelimit-remaining-{left.kind}"] = number(left.remaining)
            headers[f"x-ratelimit-reset-{left.kind}"] = duration(left.resets_in_s)
        return headers


class Admission:
    """What ``record`` tells of is counted against its caller's allowance; tokens and costs when the context ends."""

    def __init__(self, limiter: Limiter, record: RequestRecord) -> None:
        self._limiter = limiter
        self._record: RequestRecord | None = record

    @classmethod
    async def of(cls, limiter: Limiter, record: RequestRecord) -> Admission:
        """Let a request in.

        Raises:
            RateLimited: the allowance is used up; nothing was counted.
        """
        await limiter.enter(record.caller or "")
        return cls(limiter, record)

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        if (record := self._record) is not None:
            self._release(record)

    def outlive(self) -> Callable[[RequestRecord], None]:
        """Keep the place when the context has ended, until the returned function is called with the final record."""
        self._record = None
        return self._release

    def _release(self, record: RequestRecord) -> None:
        record.end_work()  # else its cost would be known only after this
        num_tokens = (record.prompt_tokens or 0) + record.completion_tokens
        self._limiter.release(record.caller or "", num_tokens, record.cost_usd or 0.0)


def number(value: float) -> str:
    """Tokens and requests whole, dollars to a millionth."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``20ms``, ``1.5s``, ``6m0s``."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < 60:
        return f"{round(seconds, 3):g}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"
