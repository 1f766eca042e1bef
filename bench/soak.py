"""Mixed good, bad, cancelled, slow and hostile traffic for minutes: ``python -m bench.soak --minutes 5 [MODEL]``.

Twice as many clients as the server can hold in its slots and its queue, each drawing its next request at random.  Every
good answer is compared with what was right before the storm: the echo engine's prompt, or a real model's greedy answer,
asked for alone (in float32, or with the compiled kernels, where a batch changes nothing).  Exit status 1: one was wrong
or lost, or a slot leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from bench.attacks import BAD_BODIES, attack
from bench.figures import load_average, machine, percentile, table
from bench.processes import HOST, BenchError, free_port, private_memory_mib, server, wait_until_ready

REST_S = 2.0
"""A model's steps are recorded when it is first idle, and are rounded like that from then on."""
PATH = "/v1/chat/completions"
KINDS = {"plain": 30, "stream": 30, "slow": 8, "cancelled": 15, "bad": 10, "hostile": 7}
"""What a client sends next, by weight."""

SLOW_ECHO = """
import runpy
from serve.engine.echo import EchoEngine
EchoEngine.__init__.__kwdefaults__["step_s"] = 0.005
runpy.run_module("serve", run_name="__main__")
"""
"""Without a model a step takes 5 ms, so that there is a capacity to exceed."""

TIMEOUT_S, MAX_REST_S, SETTLE_S = 120.0, 2.0, 20.0
PROMPTS = [f"Number {number}: héllo 🎉 " + "ab " * (number * 7 % 40) for number in range(24)]


@dataclass(slots=True)
class Storm:
    """What is sent, and what came of it."""

    url: str
    model: str
    headers: dict[str, str]
    max_tokens: int
    draw: random.Random
    right: dict[str, str] = field(default_factory=dict[str, str])
    counts: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, str] = field(default_factory=dict[str, str])
    health_s: list[float] = field(default_factory=list[float])
    lag_s: list[float] = field(default_factory=list[float])
    memory: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    leaked: int = 0

    def body(self, prompt: str, **fields: Any) -> dict[str, Any]:
        """A request whose answer is known."""
        messages = [{"role": "user", "content": prompt}]
        known = {"temperature": 0, "max_tokens": self.max_tokens}
        return {"model": self.model, "messages": messages, **known, **fields}

    def note(self, what: str, detail: object = "") -> None:
        """Count one outcome; the first detail of each is kept."""
        self.counts[what] += 1
        if detail:
            self.examples.setdefault(what, str(detail)[:300])

    def judge(self, kind: str, prompt: str, answer: httpx2.Response, text: str | None, detail: object = "") -> float:
        """Right, wrong, shed (429 or 503 that says when to come again) or lost; ``text`` None: it broke off.

        Gives the seconds that a shed client should wait.
        """
        status = answer.status_code
        if status in {429, 503} and "retry-after" in answer.headers:
            self.note("shed")
            return float(answer.headers["retry-after"])
        if status != httpx2.codes.OK or text is None:
            self.note("lost", f"{kind}: status {status}, {detail}")
        elif self.right and text != self.right[prompt]:
            self.note("wrong", f"{kind}: {text!r} in place of {self.right[prompt]!r}")
        else:
            self.note("right")
        return 0.0


def text_of(lines: Sequence[str]) -> str | None:
    """The text of a stream's lines; None when it broke off or told an error."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    if not data or data[-1] != "[DONE]":
        return None
    chunks = [json.loads(chunk) for chunk in data[:-1]]
    if any("error" in chunk for chunk in chunks):
        return None
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def ask_plain(client: httpx2.AsyncClient, storm: Storm, prompt: str) -> float:
    """One answer at once."""
    answer = await client.post(PATH, json=storm.body(prompt))
    text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == httpx2.codes.OK else None
    return storm.judge("plain", prompt, answer, text, answer.text)


async def ask_stream(client: httpx2.AsyncClient, storm: Storm, prompt: str, kind: str) -> float:
    """One stream: read to its end, with rests when ``slow``, and left in the middle when ``cancelled``."""
    lines: list[str] = []
    leave_at = storm.draw.randrange(1, 12) if kind == "cancelled" else -1
    async with client.stream("POST", PATH, json=storm.body(prompt, stream=True)) as answer:
        if answer.status_code != httpx2.codes.OK:
            return storm.judge(kind, prompt, answer, None, (await answer.aread()).decode())
        async for line in answer.aiter_lines():
            lines.append(line)
            if len(lines) == leave_at:
                storm.note("left")
                return 0.0
            if kind == "slow":
                await asyncio.sleep(0.05)
        return storm.judge(kind, prompt, answer, text_of(lines), lines[-2:])


async def ask_badly(client: httpx2.AsyncClient, storm: Storm) -> None:
    """One wrong request: it must be refused with an error that says why."""
    name = storm.draw.choice(sorted(BAD_BODIES))
    raw = json.dumps(storm.body(PROMPTS[0], **BAD_BODIES[name]))
    answer = await client.post(PATH, content=raw, headers={"content-type": "application/json"})
    is_refused = 400 <= answer.status_code < 500 and answer.json()["error"]["message"]
    storm.note(
        "refused" if is_refused else "wrong", "" if is_refused else f"{name}: {answer.status_code} {answer.text}"
    )


async def work(client: httpx2.AsyncClient, storm: Storm, until: float) -> None:
    """One client's life."""
    kinds, weights = list(KINDS), list(KINDS.values())
    while time.monotonic() < until:
        kind, rest_s = storm.draw.choices(kinds, weights)[0], 0.0
        prompt = storm.draw.choice(PROMPTS)
        storm.note(f"sent {kind}")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                if kind == "plain":
                    rest_s = await ask_plain(client, storm, prompt)
                elif kind == "bad":
                    await ask_badly(client, storm)
                elif kind == "hostile":
                    await attack(storm.url, storm.headers, storm.draw)
                else:
                    rest_s = await ask_stream(client, storm, prompt, kind)
        except (httpx2.HTTPError, TimeoutError, ValueError, KeyError) as error:
            storm.note("lost", f"{kind}: {type(error).__name__}: {error}")
        await asyncio.sleep(min(rest_s, MAX_REST_S) * storm.draw.uniform(0.5, 1))


async def watch(client: httpx2.AsyncClient, storm: Storm, pid: int | None) -> None:
    """Health ten times a second; the loop's lag and the private memory once a second."""
    for tick in range(10**9):
        began = time.monotonic()
        try:
            answer = await client.get("/health")
            storm.health_s.append(time.monotonic() - began)
            if answer.status_code != httpx2.codes.OK:
                storm.note("unhealthy", answer.text)
            if tick % 10 == 0:
                storm.lag_s.append((await gauges(client))["event_loop_lag_seconds"])
                if pid is not None:
                    storm.memory.append((began, private_memory_mib(pid)))
        except httpx2.HTTPError as error:
            storm.note("unhealthy", f"{type(error).__name__}: {error}")
        await asyncio.sleep(0.1)


async def gauges(client: httpx2.AsyncClient) -> dict[str, float]:
    """The server's metrics that have no labels."""
    text = (await client.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^trimaran_(\w+) ([0-9.e+-]+)$", text, re.MULTILINE)}


async def settle(client: httpx2.AsyncClient) -> int:
    """Sequences that are still there though nobody waits for them."""
    deadline, left = time.monotonic() + SETTLE_S, 1
    while left and time.monotonic() < deadline:
        now = await gauges(client)
        left = int(now["requests_running"] + now["requests_waiting"])
        await asyncio.sleep(0.2)
    return left


def floors(samples: Sequence[tuple[float, float]], num_windows: int = 10) -> list[tuple[float, float]]:
    """The least value of each of some windows: what is kept, without what single requests take for a moment."""
    size = max(1, len(samples) // num_windows)
    return [min(samples[at : at + size], key=lambda sample: sample[1]) for at in range(0, len(samples), size)]


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """MiB per minute, by least squares over the floors of the second half: the first is warming up."""
    half = floors(samples[len(samples) // 2 :])
    if len(half) < 2:
        return 0.0
    times, values = [at for at, _ in half], [value for _, value in half]
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((at - middle) ** 2 for at in times)
    return 60 * sum((at - middle) * (value - mean) for at, value in half) / spread if spread else 0.0


def warmed_up(samples: Sequence[tuple[float, float]]) -> float:
    """MiB by which the floor rose in the first half."""
    found = floors(samples)
    return found[len(found) // 2][1] - samples[0][1]


async def run_storm(storm: Storm, seconds: float, num_clients: int, pid: int | None) -> None:
    """Learn what is right, then let the storm blow, then count what is left."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    options: dict[str, Any] = {"base_url": storm.url, "headers": storm.headers, "limits": limits, "trust_env": False}
    async with httpx2.AsyncClient(timeout=TIMEOUT_S, **options) as client:
        right: dict[str, str] = {}
        for prompt in PROMPTS:
            answer = (await client.post(PATH, json=storm.body(prompt))).raise_for_status().json()
            right[prompt] = answer["choices"][0]["message"]["content"]
        storm.right = right
        watching = asyncio.create_task(watch(client, storm, pid))
        until = time.monotonic() + seconds
        await asyncio.gather(*(work(client, storm, until) for _ in range(num_clients)))
        watching.cancel()
        storm.leaked = await settle(client)


def report(storm: Storm, seconds: float) -> str:
    """The figures as a table."""
    sent = {name: storm.counts[f"sent {name}"] for name in KINDS}
    rows = [
        ["requests", f"{sum(sent.values())} ({', '.join(f'{count} {name}' for name, count in sent.items())})"],
        ["seconds", f"{seconds:.0f}"],
        ["right answers", str(storm.counts["right"])],
        ["wrong answers", str(storm.counts["wrong"])],
        ["lost", str(storm.counts["lost"])],
        ["shed with Retry-After", str(storm.counts["shed"])],
        ["leaked slots", str(storm.leaked)],
        ["private memory, start, MiB", f"{storm.memory[0][1]:.0f}" if storm.memory else "unknown"],
        ["private memory, end, MiB", f"{storm.memory[-1][1]:.0f}" if storm.memory else "unknown"],
        ["memory gained in the first half, MiB", f"{warmed_up(storm.memory):.0f}" if storm.memory else "unknown"],
        ["memory slope of the second half, MiB a minute", f"{slope(storm.memory):.2f}" if storm.memory else "unknown"],
        ["event loop's lag, p99, ms", f"{1000 * percentile(storm.lag_s, 99):.1f}"],
        ["/health, p99, ms", f"{1000 * percentile(storm.health_s, 99):.1f}"],
        ["/health, not 200", str(storm.counts["unhealthy"])],
    ]
    return table(["soak", "figure"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a server and the storm; return 0 when nothing was wrong, lost or leaked."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("model", nargs="?", help="a model's folder; left out: the echo engine")
    parser.add_argument("--dtype", default="float32", help="bfloat16 is exact too, with the compiled kernels of a CPU")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of the model, so that clients keep a core")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    engine = {"SERVE_MODEL": options.model, "SERVE_DTYPE": options.dtype} if options.model else {"SERVE_ENGINE": "echo"}
    port, key, before = free_port(), "sk-soak", load_average()
    environment = {"SERVE_PORT": str(port), "SERVE_API_KEYS": key, "SERVE_MAX_BATCH_SIZE": str(options.slots), **engine}
    environment |= {"SERVE_THREADS": str(options.threads), "PYTHONPATH": str(Path(__file__).parents[1])}
    max_queue = max(1, options.slots // 2)
    environment |= {"SERVE_MAX_QUEUE": str(max_queue), "SERVE_LOG_LEVEL": "warning"}
    try:
        with server(
            [sys.executable, *(["-m", "serve"] if options.model else ["-c", SLOW_ECHO])], environment
        ) as process:
            wait_until_ready(process, port, "/ready")
            headers, url = {"authorization": f"Bearer {key}"}, f"http://{HOST}:{port}"
            model = httpx2.get(url + "/v1/models", headers=headers).json()["data"][0]["id"]
            max_tokens = 16 if options.model else 400
            time.sleep(REST_S)
            storm = Storm(url, model, headers, max_tokens, random.Random(options.seed))  # noqa: S311 - a load, no secret
            asyncio.run(run_storm(storm, 60 * options.minutes, 2 * (options.slots + max_queue), process.pid))
            if process.poll() is not None:
                raise BenchError(f"the server ended with status {process.returncode}")
    except BenchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(f"{machine()}; load average before {before}, after {load_average()}\n\n{report(storm, 60 * options.minutes)}")
    for what, example in storm.examples.items():
        print(f"{what}, for example: {example}")
    return int(bool(storm.counts["wrong"] or storm.counts["lost"] or storm.leaked or storm.counts["unhealthy"]))


if __name__ == "__main__":
    sys.exit(main())
