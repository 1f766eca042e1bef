"""The Grafana dashboard's panels, evaluated by a real Prometheus that scrapes a server."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from bench.processes import HOST, BenchError, free_port

FILE = Path(__file__).parents[1] / "deploy" / "grafana" / "trimaran.json"
START_S = 20.0
CONFIG = """
global: {{scrape_interval: {interval}, scrape_timeout: {interval}}}
scrape_configs:
  - job_name: trimaran
    authorization: {{credentials: "{key}"}}
    static_configs: [{{targets: ["{target}"]}}]
"""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel: its name in the legend, and ``(seconds since the epoch, value)``."""

    name: str
    points: list[tuple[float, float]]


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, rows too, in its order."""
    return json.loads(FILE.read_text(encoding="utf-8"))["panels"]


def expression(text: str, rate_s: int) -> str:
    """PromQL of a target, with Grafana's variables as they are for all servers."""
    return text.replace("$instance", ".*").replace("$__rate_interval", f"{rate_s}s")


@contextmanager
def prometheus(executable: str, url: str, key: str, folder: Path, interval: str = "1s") -> Iterator[str]:
    """A Prometheus that scrapes one server; gives its address.

    Raises:
        BenchError: it did not start.
    """
    config, log, port = folder / "prometheus.yml", folder / "prometheus.log", free_port()
    config.write_text(CONFIG.format(interval=interval, key=key, target=urlsplit(url).netloc), encoding="utf-8")
    address = f"{HOST}:{port}"
    command = [executable, f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb"]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_S
        while not _is_ready(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"Prometheus did not start:\n{log.read_text(encoding='utf-8')[-1000:]}")
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait(10)


def _is_ready(address: str) -> bool:
    try:
        return httpx2.get(f"http://{address}/-/ready", trust_env=False).status_code == httpx2.codes.OK
    except httpx2.HTTPError:
        return False


def evaluate(address: str, panel: dict[str, Any], begin: float, end: float, rate_s: int) -> list[Series]:
    """Every series of a panel between two times, a point a second.

    Raises:
        BenchError: Prometheus refused an expression.
    """
    found: list[Series] = []
    for target in panel.get("targets", []):
        asked = {"query": expression(target["expr"], rate_s), "start": begin, "end": end, "step": 1}
        answer = httpx2.get(f"{address}/api/v1/query_range", params=asked, trust_env=False).json()
        if answer["status"] != "success":
            raise BenchError(f"{panel['title']}: {answer['error']} in {asked['query']}")
        for series in answer["data"]["result"]:
            labels: dict[str, str] = series["metric"]
            name = re.sub(r"{{(\w+)}}", lambda match, labels=labels: labels.get(match[1], ""), target["legendFormat"])
            found.append(Series(name, [(float(at), float(value)) for at, value in series["values"]]))
    return found
