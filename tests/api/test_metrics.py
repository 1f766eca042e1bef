"""``/metrics``: what was served, in Prometheus' format, with series that no caller can multiply."""

from __future__ import annotations

import threading

import httpx2 as httpx
import pytest
import support
from prometheus_client.parser import text_string_to_metric_families
from support import Served, chat, serving

COMPLETIONS = "/v1/chat/completions"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(client: httpx.Client) -> Samples:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"trimaran_{name}", tuple(sorted(labels.items()))), 0.0)


def scrape_after(num_requests: int, client: httpx.Client) -> Samples:
    """A scrape that knows of so many requests besides scrapes: a client may see an answer before it is counted."""

    def num_counted() -> float:
        return sum(
            number
            for (name, labels), number in scrape(client).items()
            if name == "trimaran_http_requests_total" and ("route", "/metrics") not in labels
        )

    support.eventually(lambda: num_counted() >= num_requests)
    return scrape(client)


@pytest.mark.parametrize("stream", [False, True])
def test_metrics_count_requests_and_tokens(stream: bool) -> None:
    with serving() as served, httpx.Client(base_url=served.url) as client:
        for _ in range(3):
            assert client.post(COMPLETIONS, json=chat("abcd", stream=stream)).status_code == 200
        samples = scrape_after(3, client)

    assert value(samples, "http_requests_total", route=COMPLETIONS, status="200") == 3
    assert value(samples, "generations_total", finish_reason="stop") == 3
    assert value(samples, "prompt_tokens_total") == 12
    assert value(samples, "generation_tokens_total") == 15  # the end of each sequence is a token
    for name in ("time_to_first_token", "time_per_output_token", "request_queue", "request_duration"):
        assert value(samples, f"{name}_seconds_count") == 3, name
    assert value(samples, "request_generation_tokens_sum") == 15


def test_metrics_count_errors_by_code() -> None:
    with serving() as served, httpx.Client(base_url=served.url) as client:
        client.post(COMPLETIONS, json=chat("a") | {"model": "other"})
        client.post(COMPLETIONS, content=b"{", headers={"content-type": "application/json"})
        client.post(COMPLETIONS, json=chat("a" * 9000))
        samples = scrape_after(3, client)

    assert value(samples, "errors_total", code="model_not_found") == 1
    assert value(samples, "errors_total", code="context_length_exceeded") == 1
    assert value(samples, "http_requests_total", route=COMPLETIONS, status="400") == 2
    assert value(samples, "http_requests_total", route=COMPLETIONS, status="404") == 1
    assert value(samples, "generations_total", finish_reason="stop") == 0


def test_metrics_have_no_series_that_a_caller_chooses() -> None:
    with serving() as served, httpx.Client(base_url=served.url) as client:
        client.get("/nowhere")
        before = set(scrape(client))
        for number in range(20):
            client.get(f"/nowhere/{number}")
            client.request("POST", f"/v1/models/{number}")
        client.get("/v1/models/other")
        after = scrape_after(42, client)

    assert {name for name in after if name not in before} <= {
        ("trimaran_http_requests_total", (("route", "/v1/models/{model:path}"), ("status", status)))
        for status in ("404", "405")
    } | {("trimaran_errors_total", (("code", "model_not_found"),))} | {
        ("trimaran_http_requests_total", (("route", route), ("status", status)))
        for route in ("unknown", "/metrics")
        for status in ("200", "405")
    } | {(name, labels) for name, labels in after if name.endswith("_created")}
    assert value(after, "http_requests_total", route="unknown", status="404") == 21


def test_metrics_tell_the_load_of_this_moment(held: tuple[Served, threading.Event]) -> None:
    served, release = held
    with httpx.Client(base_url=served.url) as client:
        asking = threading.Thread(target=lambda: httpx.post(served.url + COMPLETIONS, json=chat("a"), timeout=30))
        asking.start()
        support.eventually(lambda: value(scrape(client), "requests_running") == 1)
        samples = scrape(client)
        release.set()
        asking.join()

        assert value(samples, "slots") == served.stats().num_slots
        assert value(samples, "state", state="ready") == 1
        assert value(samples, "state", state="dead") == 0
        assert value(samples, "cold_start_seconds", phase="total") > 0
        support.eventually(lambda: value(scrape(client), "requests_running") == 0)


@pytest.fixture
def held():
    """A server whose engine makes no step before the event is set."""
    from serve.engine.base import EngineConfig
    from serve.engine.echo import EchoRunner
    from serve.engine.worker import StepEngine

    release = threading.Event()

    class Held(EchoRunner):
        def step(self, batch):
            release.wait(30)
            return super().step(batch)

    with serving(StepEngine(EngineConfig(), Held(EngineConfig()))) as served:
        yield served, release
    release.set()


def test_metrics_need_a_key() -> None:
    with serving(api_keys=("secret-key",)) as served, httpx.Client(base_url=served.url) as client:
        assert client.get("/metrics").status_code == 401
        client.headers["authorization"] = "Bearer secret-key"
        assert value(scrape(client), "slots") > 0
