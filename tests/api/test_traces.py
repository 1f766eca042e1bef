"""Spans as a collector on loopback receives them."""

from __future__ import annotations

import gzip
import importlib.util
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2 as httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from support import chat, eventually, running, serving

from serve.errors import ConfigError

COMPLETIONS = "/v1/chat/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
Span = dict[str, Any]


@contextmanager
def collecting() -> Iterator[tuple[str, list[Span]]]:
    """A collector's address, and the spans that it has got."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                data = gzip.decompress(data)
            for group in ExportTraceServiceRequest.FromString(data).resource_spans:
                service = {item.key: item.value.string_value for item in group.resource.attributes}["service.name"]
                spans.extend(read(span) | {"service": service} for part in group.scope_spans for span in part.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read(span: Any) -> Span:
    return {
        "name": span.name,
        "trace": span.trace_id.hex(),
        "parent": span.parent_span_id.hex(),
        "begin": span.start_time_unix_nano,
        "end": span.end_time_unix_nano,
        "status": span.status.code,
        "events": [(event.name, event.time_unix_nano) for event in span.events],
        **{item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes},
    }


def test_trace_has_one_span_for_each_request() -> None:
    began = time.time_ns()
    with (
        collecting() as (url, spans),
        serving(traces_url=url) as served,
        httpx.Client(base_url=served.url, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}) as client,
    ):
        client.post(COMPLETIONS, json=chat("the secret prompt", stream=True))
        client.post(COMPLETIONS, json=chat("a") | {"model": "other"})
        client.get("/health")
        client.get("/v1/models", headers={"traceparent": "00-zz-zz-01"})
        eventually(lambda: len(spans) >= 3)

    assert len(spans) == 3
    good, bad, models = sorted(spans, key=lambda span: span["begin"])
    assert (good["trace"], good["parent"]) == (bad["trace"], bad["parent"]) == (TRACE, PARENT)
    assert models["trace"] != TRACE
    assert (good["name"], good["service"], good["status"]) == (f"POST {COMPLETIONS}", "trimaran", 0)
    assert (good["gen_ai.usage.input_tokens"], good["gen_ai.usage.output_tokens"]) == (17, 18)
    assert [name for name, _ in good["events"]] == ["queued", "prefill", "decode", "last_token"]
    moments = [good["begin"], *(at for _, at in good["events"]), good["end"]]
    assert moments == sorted(moments)
    assert began - 10**9 < moments[0] < moments[-1] < time.time_ns() + 10**9
    assert (bad["http.response.status_code"], bad["error.type"], bad["status"]) == (404, "model_not_found", 2)
    assert "secret" not in str(spans)


def test_trace_that_waits_is_sent_on_a_drain() -> None:
    with collecting() as (url, spans), running(SERVE_TRACES_URL=url, OTEL_SERVICE_NAME="mine") as server:
        assert httpx.post(server.url + COMPLETIONS, json=chat("a")).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert [span["service"] for span in spans] == ["mine"]


def test_collector_that_is_away_costs_no_request_and_little_of_a_drain() -> None:
    with running(SERVE_TRACES_URL="http://127.0.0.1:9/v1/traces") as server:
        assert httpx.post(server.url + COMPLETIONS, json=chat("a")).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0


def test_settings_of_traces_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="SERVE_TRACES_URL=collector is no address"), serving(traces_url="collector"):
        pass
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trimaran\[traces\]"), serving(traces_url="http://127.0.0.1:9"):
        pass
