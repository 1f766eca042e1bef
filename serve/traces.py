"""OpenTelemetry: one span for each request, with its parts as events, made when the request has ended.

Needs the extra ``traces``.  The SDK's own thread sends spans; a collector that is away costs them, never a request.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from typing import Any

from serve.background import in_background
from serve.errors import ConfigError
from serve.observe import RequestRecord

EXPORT_TIMEOUT_S = 2.0
CLOSE_S = 2.0


class Traces:
    """Sends spans to a collector.

    Args:
        url: Where it takes OTLP over HTTP: ``http://collector:4318/v1/traces``.

    Raises:
        ConfigError: the package is missing, or this is no address.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"SERVE_TRACES_URL={url} is no address: use http://HOST:4318/v1/traces")
        if any(importlib.util.find_spec(name) is None for name in ("opentelemetry", "opentelemetry.sdk")):
            raise ConfigError(
                "SERVE_TRACES_URL needs OpenTelemetry's SDK: pip install 'trimaran[traces]' "
                "(an image: --build-arg EXTRAS=engine,traces)"
            )
        self._url = url
        self._provider: Any = None
        self._tracer: Any = None

    def start(self) -> None:
        """Begin to send.  OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, ... are the SDK's own."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        resource = Resource.create()
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "trimaran"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=self._url, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("trimaran")

    def put(self, record: RequestRecord) -> None:
        """Make the span of a request that has ended, below the caller's own if it named one."""
        if self._tracer is None:
            return
        from opentelemetry.trace import SpanKind  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
        from opentelemetry.trace.status import Status, StatusCode  # noqa: PLC0415

        began = time.time_ns() - _ns(record.age_s)
        span = self._tracer.start_span(
            f"{record.method} {record.endpoint or 'unknown'}",
            context=TraceContextTextMapPropagator().extract(record.trace_headers),
            kind=SpanKind.SERVER,
            attributes=_attributes(record),
            start_time=began,
        )
        for name, at in _events(record).items():
            span.add_event(name, timestamp=began + _ns(at - record.received_at))
        if record.error_code is not None or (record.status or 0) >= 500:
            span.set_status(Status(StatusCode.ERROR, record.error_code))
        span.end()

    async def close(self) -> None:
        """Send what is left, for :data:`CLOSE_S` seconds at most."""
        self._tracer, provider = None, self._provider
        if provider is not None:
            await asyncio.wait({in_background(provider.shutdown)}, timeout=CLOSE_S)


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """OpenTelemetry's names of HTTP and of generative AI; never a word of the text."""
    known: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.endpoint,
        "http.response.status_code": record.status,
        "error.type": record.error_code,
        "enduser.id": record.caller,
        "gen_ai.request.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": None if record.prompt_tokens is None else record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens or None,
        "gen_ai.response.finish_reasons": None if record.finish_reason is None else [record.finish_reason],
        "trimaran.request_id": record.request_id,
        "trimaran.machine_ms": None if record.machine_s is None else record.machine_s * 1000,
        "trimaran.cost_usd": record.cost_usd,
    }
    return {name: value for name, value in known.items() if value is not None}


def _events(record: RequestRecord) -> dict[str, float]:
    """When the request was queued, got its slot, its first and its last token; seconds of ``time.perf_counter``."""
    queued = record.queued_at
    prefill = None if queued is None or record.queue_s is None else queued + record.queue_s
    moments = {
        "queued": queued,
        "prefill": prefill,
        "decode": record.first_token_at,
        "last_token": record.last_token_at,
    }
    return {name: at for name, at in moments.items() if at is not None}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
