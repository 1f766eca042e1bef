"""A load generator for OpenAI-compatible streams: ``python -m bench.load --help``.

Closed loop: each of ``--concurrency`` clients sends its next request when its last one ended.  Open loop: requests
arrive at ``--rate``, whatever the server does.  Bounded, and only for servers on this machine.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from bench.figures import summary_ms
from bench.processes import cpu_s, memory_mib
from bench.sse import EventReader, Outcome
from serve.settings import is_loopback

MAX_REQUESTS = 10_000
MAX_CONCURRENCY = 512
LAG_TICK_S = 0.01
SUBJECTS = ("tides", "glass", "bees", "maps", "bread", "clocks", "bridges", "paper", "salt", "wind", "ink", "rice")
PADDING = "The harbour was quiet, the boats were tied to the old stones, and somebody was mending a net by lamplight. "


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What to send, where, and how fast.

    ``rate`` is the mean arrivals per second of an open loop; None means a closed loop of ``concurrency`` clients.
    ``prompt_words`` of padding come before each question.  ``timeout_s`` bounds each request.  ``first`` is the
    number of the first question, for loads that must not repeat another's.
    """

    url: str
    model: str
    concurrency: int = 1
    rate: float | None = None
    num_requests: int = 8
    max_tokens: int = 128
    prompt_words: int = 0
    timeout_s: float = 300.0
    asks_usage: bool = True
    pid: int | None = None
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        host = urlsplit(self.url).hostname
        if not host or not is_loopback(host):
            raise ValueError(f"{self.url} is not on this machine: only loopback addresses are put under load")
        if not 1 <= self.num_requests <= MAX_REQUESTS or not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise ValueError(f"send 1 to {MAX_REQUESTS} requests, from 1 to {MAX_CONCURRENCY} clients")
        if self.rate is not None and not self.rate > 0:
            raise ValueError("the rate of an open loop is above 0 requests per second")


def prompt(index: int, num_words: int) -> str:
    """The text of one request.  Prompts differ from their first words on, so that no prefix cache helps."""
    words = (PADDING * (num_words // len(PADDING.split()) + 1)).split()[:num_words]
    subject = SUBJECTS[index % len(SUBJECTS)]
    return " ".join(
        [f"Question {index}.", *words, f"Write a very long and detailed essay about the history of {subject}."]
    )


async def send(client: httpx2.AsyncClient, plan: LoadPlan, index: int) -> Outcome:
    """Send one request and read its stream to the end; errors are in the outcome."""
    body: dict[str, Any] = {
        "model": plan.model,
        "messages": [{"role": "user", "content": prompt(index, plan.prompt_words)}],
        "stream": True,
        "max_tokens": plan.max_tokens,
        "temperature": 0.0,
    }
    if plan.asks_usage:
        body["stream_options"] = {"include_usage": True}
    reader, outcome = EventReader(), Outcome(time.perf_counter())
    try:
        async with (
            asyncio.timeout(plan.timeout_s),
            client.stream("POST", plan.url.rstrip("/") + "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != httpx2.codes.OK:
                outcome.fail(f"http_{response.status_code}", (await response.aread()).decode(errors="replace"))
                return outcome
            async for piece in response.aiter_raw():
                now = time.perf_counter()
                for data in reader.feed(piece):
                    outcome.take(data, now)
        outcome.close(time.perf_counter())
    except TimeoutError:
        outcome.fail("timeout")
    except httpx2.HTTPError as error:
        outcome.fail(type(error).__name__, str(error))
    return outcome


async def _closed(client: httpx2.AsyncClient, plan: LoadPlan) -> list[Outcome]:
    indices, outcomes = iter(range(plan.first, plan.first + plan.num_requests)), list[Outcome]()

    async def work() -> None:
        for index in indices:
            outcomes.append(await send(client, plan, index))

    await asyncio.gather(*(work() for _ in range(plan.concurrency)))
    return outcomes


async def _open(client: httpx2.AsyncClient, plan: LoadPlan, rate: float) -> list[Outcome]:
    arrivals, due, tasks = random.Random(plan.seed), time.perf_counter(), list[asyncio.Task[Outcome]]()  # noqa: S311
    for index in range(plan.first, plan.first + plan.num_requests):
        due += arrivals.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(send(client, plan, index)))
    return await asyncio.gather(*tasks)


async def _watch(pid: int | None, lags: list[float], memory: list[float]) -> None:
    """Note how late this process is (a starved client sees bursts that are its own) and the server's memory."""
    sampled_at = 0.0
    while True:
        began = time.perf_counter()
        await asyncio.sleep(LAG_TICK_S)
        lags.append(time.perf_counter() - began - LAG_TICK_S)
        if pid is not None and began - sampled_at > 1.0:
            memory.append(memory_mib(pid))
            sampled_at = began


async def run_load(plan: LoadPlan) -> dict[str, Any]:
    """Warm up with one short request, then carry out the plan; return the report."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=MAX_CONCURRENCY)
    lags, memory = list[float](), list[float]()
    # No proxy of the environment may carry the load elsewhere.
    async with httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        await send(client, plan, plan.first + MAX_REQUESTS)
        watching = asyncio.create_task(_watch(plan.pid, lags, memory))
        cpu_before, began = cpu_s(plan.pid) if plan.pid else 0.0, time.perf_counter()
        outcomes = await (_closed(client, plan) if plan.rate is None else _open(client, plan, plan.rate))
        wall_s = time.perf_counter() - began
        used_s = cpu_s(plan.pid) - cpu_before if plan.pid else None
        watching.cancel()
    return report(plan, outcomes, wall_s, used_s) | {
        "client_lag_ms": summary_ms(lags),
        "memory_mib": round(max(memory)) if memory else None,
    }


def report(plan: LoadPlan, outcomes: Sequence[Outcome], wall_s: float, used_s: float | None) -> dict[str, Any]:
    """The figures of a finished run; latencies are of the requests that succeeded."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    tokens = sum(outcome.num_tokens(plan.max_tokens) for outcome in good)
    return {
        "plan": asdict(plan),
        "num_ok": len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        "error_example": next((outcome.detail for outcome in outcomes if outcome.error is not None), None),
        "finish_reasons": dict(Counter(outcome.finish_reason for outcome in good)),
        "num_done": sum(outcome.is_done for outcome in good),
        "output_tokens": tokens,
        "prompt_tokens": next((outcome.prompt_tokens for outcome in good if outcome.prompt_tokens), None),
        "wall_s": round(wall_s, 3),
        "tokens_per_s": round(tokens / wall_s, 2),
        "cpu_s": None if used_s is None else round(used_s, 3),
        "cpu_ms_per_token": round(used_s * 1000 / tokens, 3) if used_s is not None and tokens else None,
        "ttft_ms": summary_ms([ttft for outcome in good if (ttft := outcome.ttft_s) is not None]),
        "itl_ms": summary_ms([gap for outcome in good for gap in outcome.gaps_s]),
        "total_ms": summary_ms([outcome.ended_at - outcome.sent_at for outcome in good if outcome.ended_at]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when every request succeeded, 1 when one failed, 2 when the plan is refused."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, default=1, help="clients of a closed loop")
    parser.add_argument("--rate", type=float, help="arrivals per second: makes it an open loop")
    parser.add_argument("--requests", type=int, default=8, dest="num_requests")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompt-words", type=int, default=0, help="padding before each question")
    parser.add_argument("--timeout", type=float, default=300.0, dest="timeout_s", help="seconds for each request")
    parser.add_argument(
        "--no-usage", action="store_false", dest="asks_usage", help="for servers without stream_options"
    )
    parser.add_argument("--pid", type=int, help="the server's process: adds CPU per token and memory of its tree")
    parser.add_argument("--seed", type=int, default=0, help="of an open loop's arrivals")
    parser.add_argument("--first", type=int, default=0, help="number of the first question")
    try:
        plan = LoadPlan(**vars(parser.parse_args(argv)))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    figures = asyncio.run(run_load(plan))
    print(json.dumps(figures))
    return 1 if figures["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
