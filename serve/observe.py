"""What an operator sees: log lines on stderr, one record for each request.  Never prompt or completion text."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from asyncio import CancelledError
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from serve.machine_time import MachineTime, Share
from serve.settings import LogFormat

logger = logging.getLogger("serve.request")

_STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}

_UNLOGGED = frozenset(
    {"received_at", "queue_s", "first_token_at", "last_token_at", "endpoint", "machine", "share", "machine_s"}
    | {"deadline_s", "queued_at", "trace_headers", "goes_on"}
)


MAX_ROUTE = 200
"""Characters of a path in the log: who has no key may send 64 KiB of it."""


@dataclass(slots=True)
class RequestRecord:
    """One request, filled in while it is served and logged once when it ends.

    Times are seconds of :func:`time.perf_counter`; the log line has milliseconds.
    """

    request_id: str
    method: str
    route: str
    received_at: float = field(default_factory=time.perf_counter)
    status: int | None = None
    caller: str | None = None
    key_id: str | None = None
    model: str | None = None
    is_stream: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    finish_reason: str | None = None
    error_code: str | None = None
    queue_s: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    cached_tokens: int = 0
    endpoint: str | None = None
    """The route as it is declared; None: there is none."""
    queued_at: float | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """The caller's place in a trace, as W3C's headers have it."""
    deadline_s: float | None = None
    """Seconds that it may take in all; None: no bound."""
    machine: MachineTime | None = None
    """Measures the request's share of the machine; None: nobody does."""
    share: Share | None = None
    machine_s: float | None = None
    cost_usd: float | None = None
    goes_on: bool = False
    """It is answered but goes on in the background, whose end is the request's."""

    def begin_work(self, num_sequences: int, queued_at: float) -> None:
        """The machine works for this request from ``queued_at`` (``time.perf_counter``) on, until it ends."""
        self.queued_at = queued_at
        if self.machine is not None and self.share is None:
            self.share = self.machine.begin(num_sequences)

    def end_work(self) -> None:
        """Note what the request had of the machine, and what that costs."""
        if self.machine is not None and self.share is not None:
            self.machine_s, self.share = self.machine.end(self.share), None
            self.cost_usd = self.machine.cost_usd(self.machine_s)

    def saw_tokens(self, num_tokens: int) -> None:
        """Note that tokens arrived now."""
        now = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now
        self.completion_tokens += num_tokens

    def as_fields(self) -> dict[str, Any]:
        """The log line's fields; what is unknown is left out."""
        values: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in _UNLOGGED
        }
        values["route"] = self.route if len(self.route) <= MAX_ROUTE else self.route[:MAX_ROUTE] + "..."
        if self.key_id == self.caller:
            del values["key_id"]
        if self.first_token_at is None:
            del values["completion_tokens"], values["cached_tokens"]
        values["queue_ms"] = _ms(self.queue_s)
        values["ttft_ms"] = _ms(self.ttft_s)
        values["itl_ms_mean"] = _ms(self.itl_s)
        values["total_ms"] = _ms(self.age_s)
        values["machine_ms"] = _ms(self.machine_s)
        return {name: value for name, value in values.items() if value is not None}

    @property
    def age_s(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self.received_at

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the request to its first token."""
        return None if self.first_token_at is None else self.first_token_at - self.received_at

    @property
    def itl_s(self) -> float | None:
        """Mean seconds between tokens."""
        if self.first_token_at is None or self.last_token_at is None or self.completion_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.completion_tokens - 1)

    def server_timing(self) -> str:
        """What is known so far as the header ``Server-Timing``: a stream's headers leave before its first token."""
        prefill_s = None if self.ttft_s is None else max(0.0, self.ttft_s - (self.queue_s or 0.0))
        decode_s = None if self.first_token_at is None else time.perf_counter() - self.first_token_at
        parts = {"queue": self.queue_s, "prefill": prefill_s, "decode": decode_s, "total": self.age_s}
        return ", ".join(f"{name};dur={_ms(seconds)}" for name, seconds in parts.items() if seconds is not None)

    def log(self) -> None:
        """Write the line."""
        values = self.as_fields()
        logger.info(" ".join(f"{name}={_on_one_line(value)}" for name, value in values.items()), extra=values)


def _on_one_line(value: Any) -> str:
    """A caller chooses the path: it must not be able to forge a line or to steer a terminal."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def process_age_s() -> float:
    """Seconds since this process was started: interpreter and imports, when called early.  0 where unknown."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 4)
    except (OSError, AttributeError, ValueError):
        return 0.0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message and whatever ``extra`` holds."""

    def format(self, record: logging.LogRecord) -> str:
        """Encode; what JSON does not know becomes a string."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        extra = {name: value for name, value in record.__dict__.items() if name not in _STANDARD_FIELDS}
        if record.name != logger.name:
            line["message"] = record.getMessage()
        line.update(extra)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


_FAULTS_OF_CLIENTS = frozenset(
    {"ASGI callable returned without completing handshake.", "Invalid UTF-8 sequence received from client."}
)
"""What uvicorn logs as errors, with tracebacks: a WebSocket that was refused, and one that sent what is no text."""


def _is_ours(record: logging.LogRecord) -> bool:
    """Neither a client's fault, nor what a server cancels because it ends: a reader that stalls, say."""
    is_cancelled = record.exc_info is not None and isinstance(record.exc_info[1], CancelledError)
    return record.msg not in _FAULTS_OF_CLIENTS and not is_cancelled


def configure_logging(log_format: LogFormat, level: str) -> None:
    """Send all logs to stderr.  Only composition roots call this."""
    as_json = log_format is LogFormat.JSON or (log_format is LogFormat.AUTO and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonFormatter() if as_json else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_is_ours)
    for name in ("serve", "trimaran"):
        logging.getLogger(name).setLevel(level.upper())
