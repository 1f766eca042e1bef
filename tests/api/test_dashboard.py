"""The Grafana dashboard asks for what a running server exports: metrics, labels, and values that are spelled out."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx2 as httpx
import pytest
import support
from prometheus_client.parser import text_string_to_metric_families
from support import chat, serving

from bench.dashboard import expression, panels
from serve.metrics import GpuMemory

Exported = dict[str, dict[str, set[str]]]
"""Of each metric its labels, and of each label the values that were seen."""
SELECTED = re.compile(r"(trimaran_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')


def unknown(promql: str, legend: str, exported: Exported) -> set[str]:
    """What an expression and its legend name that no server has."""
    found: set[str] = set()
    labels: set[str] = {"instance"}  # Prometheus' own
    for name, matchers in SELECTED.findall(promql):
        known = exported.get(name, {}) | {"instance": set()}
        found |= {name} - exported.keys()
        labels |= known.keys()
        for label, operator, value in MATCHER.findall(matchers):
            found |= {f"{name}.{label}"} - {f"{name}.{each}" for each in known}
            if operator in ("=", "!=") and value not in known.get(label, ()):
                found.add(f"{label}={value}")
    grouped = [name.strip() for names in re.findall(r"\bby \(([^)]*)\)", promql) for name in names.split(",")]
    return found | {*grouped, *re.findall(r"{{(\w+)}}", legend)} - labels


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """What a server exports after an answer and a refusal, and what it would with a GPU."""

    def scrape() -> Exported:
        found: Exported = {}
        for family in text_string_to_metric_families(client.get("/metrics").text):
            for sample in family.samples:
                for label, value in (sample.labels or {"": ""}).items():
                    found.setdefault(sample.name, {}).setdefault(label, set()).add(value)
        return found

    records = f"sqlite:///{tmp_path_factory.mktemp('records')}/usage.db"
    with serving(records_url=records) as served, httpx.Client(base_url=served.url) as client:
        assert client.post("/v1/chat/completions", json=chat("abcd")).status_code == 200
        assert client.post("/v1/chat/completions", json=chat("a") | {"model": "other"}).status_code == 404
        # A client may have an answer before it is counted.
        support.eventually(lambda: {"trimaran_errors_total", "trimaran_generations_total"} <= scrape().keys())
        found = scrape()
    gpu = GpuMemory(lambda: {"allocated": 1})
    asyncio.run(gpu.sample())
    for metric in gpu.collect():
        found[metric.name] = {label: {value} for label, value in metric.samples[0].labels.items()}
    return found


def test_dashboard_names_only_what_a_server_exports(exported: Exported) -> None:
    targets = [(panel["title"], target) for panel in panels() for target in panel.get("targets", [])]

    assert len(targets) > 30
    for title, target in targets:
        promql = expression(target["expr"], 60)
        assert SELECTED.search(promql), title
        assert "$" not in promql, title
        assert unknown(promql, target["legendFormat"], exported) == set(), title


@pytest.mark.parametrize(
    ("promql", "legend", "found"),
    [
        ("sum(trimaran_slot)", "", {"trimaran_slot"}),
        ('trimaran_slots{state="ready"}', "", {"trimaran_slots.state", "state=ready"}),
        ('sum(trimaran_state{state="redy"})', "", {"state=redy"}),
        ("sum by (status) (trimaran_errors_total)", "{{code}}", {"status"}),
        ("sum by (code) (trimaran_errors_total)", "{{status}}", {"status"}),
        ("trimaran_time_to_first_token_seconds", "", {"trimaran_time_to_first_token_seconds"}),
        ("sum by (le) (trimaran_time_to_first_token_seconds_bucket)", "p50", set()),
    ],
)
def test_names_that_no_server_exports_are_found(promql: str, legend: str, found: set[str], exported: Exported) -> None:
    assert unknown(promql, legend, exported) == found


def test_dashboard_takes_its_servers_from_a_metric_that_there_is(exported: Exported) -> None:
    text = (Path(__file__).parents[2] / "deploy/grafana/trimaran.json").read_text(encoding="utf-8")
    asked = re.findall(r"label_values\((\w+), instance\)", text)
    assert len(asked) == 1
    assert asked[0] in exported
