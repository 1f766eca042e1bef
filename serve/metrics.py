"""What Prometheus scrapes: counters and histograms of finished requests, and the state at the moment of asking.

Label values come from this server alone (routes as declared, error codes of the tree), never from callers: nobody can
grow the number of series.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.background import in_background
from serve.engine.device import gpu_memory
from serve.lifecycle import Lifecycle, State
from serve.observe import RequestRecord
from serve.watchdog import Watchdog

if TYPE_CHECKING:
    from serve.records.writer import RecordWriter
    from serve.sharing.limiter import SharedLimiter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "trimaran"
UNKNOWN = "unknown"

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Buckets for what takes a step or less."""
LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Buckets for what a caller waits for."""
DRIVER_WAIT_S = 0.2
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """One app's metrics, in a registry of their own.

    Args:
        lifecycle: Asked at each scrape.
        watchdog: Asked at each scrape.
        records: Asked at each scrape, where records go into a database.
        limiter: Asked at each scrape, where limits are shared.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        watchdog: Watchdog,
        records: RecordWriter | None = None,
        limiter: SharedLimiter | None = None,
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_State(lifecycle, watchdog))
        if records is not None:
            self._registry.register(_Records(records))
        if limiter is not None:
            self._registry.register(_Limits(limiter))
        self._gpu_memory = GpuMemory()
        self._registry.register(self._gpu_memory)
        self._requests = self._counter("http_requests", "Requests by route and status.", ("route", "status"))
        self._finished = self._counter("generations", "Generations by why they ended.", ("finish_reason",))
        self._errors = self._counter("errors", "Errors by code, also those inside a stream.", ("code",))
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_prompt_tokens", "Prompt tokens that were not computed again.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._ttft = self._histogram("time_to_first_token_seconds", "Request received to first token.", LONG_S)
        self._tpot = self._histogram("time_per_output_token_seconds", "Mean gap between a request's tokens.", SHORT_S)
        self._queued = self._histogram("request_queue_seconds", "Wait for a slot.", LONG_S)
        self._duration = self._histogram("request_duration_seconds", "Request received to last byte.", LONG_S)
        self._prompt_size = self._histogram("request_prompt_tokens", "Tokens of one request's prompt.", TOKENS)
        self._output_size = self._histogram("request_generation_tokens", "Tokens generated for one request.", TOKENS)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, registry=self._registry, buckets=tuple(buckets))

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.endpoint or UNKNOWN, str(record.status)).inc()
        if record.error_code is not None:
            self._errors.labels(record.error_code).inc()
        if record.prompt_tokens is None:
            return
        if record.finish_reason is not None:
            self._finished.labels(record.finish_reason).inc()
        self._prompt.inc(record.prompt_tokens)
        self._prompt_size.observe(record.prompt_tokens)
        self._cached.inc(record.cached_tokens)
        self._generated.inc(record.completion_tokens)
        self._output_size.observe(record.completion_tokens)
        self._duration.observe(record.age_s)
        for histogram, seconds in (
            (self._ttft, record.ttft_s),
            (self._tpot, record.itl_s),
            (self._queued, record.queue_s),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    async def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        await self._gpu_memory.sample()
        return generate_latest(self._registry)


class _State(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, lifecycle: Lifecycle, watchdog: Watchdog) -> None:
        self._lifecycle = lifecycle
        self._watchdog = watchdog

    def collect(self) -> Iterator[Metric]:
        """The state of this moment; on the event loop."""
        stats = self._lifecycle.engine.stats()
        yield _gauge("requests_running", "Sequences in slots.", stats.num_running)
        yield _gauge("requests_waiting", "Sequences that wait for a slot.", stats.num_waiting)
        yield _gauge("slots", "Sequences that can run at once.", stats.num_slots)
        yield _gauge("step_age_seconds", "How long the present step has been running.", stats.step_age_s)
        yield _gauge("token_age_seconds", "Time since the last token of any request.", stats.token_age_s)
        yield _gauge("event_loop_lag_seconds", "How late the event loop was lately.", self._watchdog.loop_lag_s)
        yield _counter("engine_steps", "Steps of the engine since it was loaded.", stats.num_steps)
        state = GaugeMetricFamily(f"{PREFIX}_state", "1 for the server's state, 0 for the others.", labels=["state"])
        for name in State:
            state.add_metric([name.value], float(self._lifecycle.state is name))
        yield state
        phases = GaugeMetricFamily(f"{PREFIX}_cold_start_seconds", "The cold start, by phase.", labels=["phase"])
        for name, seconds in self._lifecycle.phases.items():
            phases.add_metric([name], seconds)
        yield phases


class GpuMemory(Collector):
    """The GPU's memory.  The driver is asked in a thread: one that hangs costs a scrape :data:`DRIVER_WAIT_S`."""

    def __init__(self, ask: Callable[[], Mapping[str, int]] = gpu_memory) -> None:
        self._ask = ask
        self._asking: asyncio.Future[Mapping[str, int]] | None = None
        self._known: Mapping[str, int] = {}

    async def sample(self) -> None:
        """Ask again, unless the last question is still open."""
        if self._asking is None:
            self._asking = in_background(self._ask)
        await asyncio.wait({self._asking}, timeout=DRIVER_WAIT_S)
        if self._asking.done():
            self._known, self._asking = self._asking.result(), None

    def collect(self) -> Iterator[Metric]:
        """What was heard last; nothing where there is no GPU."""
        if self._known:
            memory = GaugeMetricFamily(f"{PREFIX}_gpu_memory_bytes", "The GPU's memory, by use.", labels=["use"])
            for name, num_bytes in self._known.items():
                memory.add_metric([name], num_bytes)
            yield memory


class _Records(Collector):
    """What became of the usage records."""

    def __init__(self, records: RecordWriter) -> None:
        self._records = records

    def collect(self) -> Iterator[Metric]:
        """The numbers of this moment."""
        yield _counter("usage_records_written", "Usage records in the database.", self._records.num_written)
        yield _counter(
            "usage_records_dropped", "Usage records that the buffer could not hold.", self._records.num_dropped
        )
        yield _gauge("usage_records_waiting", "Usage records that are not written yet.", self._records.num_waiting)


class _Limits(Collector):
    """Whether limits are shared now."""

    def __init__(self, limiter: SharedLimiter) -> None:
        self._limiter = limiter

    def collect(self) -> Iterator[Metric]:
        """The state of this moment; on the event loop."""
        link = self._limiter.link
        yield _gauge("limits_shared", "1 while the database counts for all replicas, else 0.", float(link.is_up))
        yield _gauge("limit_replicas", "Replicas that share limits, as known last.", link.num_replicas)
        yield _counter(
            "limits_decided_alone", "Requests that this replica decided without the database.", self._limiter.num_alone
        )


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)
