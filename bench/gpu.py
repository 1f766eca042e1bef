"""The engine on a GPU, in one command under 8 minutes: ``python -m bench.gpu``.

Runs the engine's tests on the card, then measures a random Llama of 8 billion weights with 1, 8 and 32 requests at
once: ours, ours with each step read at once, ours without CUDA graphs, and transformers' own continuous batching,
beside the time in which the card's memory could be read.  ``--tiny`` takes a small model instead, which also runs on a
CPU: it tries the command itself.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.figures import percentile, table, write_section
from serve.engine import loader
from serve.engine.base import EngineConfig, ModelFiles, TokenStream
from serve.engine.runner import TransformersRunner
from serve.engine.worker import StepEngine
from serve.types import GenerationRequest, SamplingParams

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "benchmarks.md"
TESTS = ("test_families", "test_engine", "test_prefix_reuse", "test_sampling_requests", "test_sampler")
TEST_LIMIT_S = 180
CLIENTS = (1, 8, 32)
PROMPT_TOKENS = 128
COPY_BYTES = 2**32
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}


@dataclass(slots=True)
class Row:
    """One server's figures at one number of requests."""

    name: str
    clients: int
    tokens_per_s: float
    step_ms: float | None = None
    bound_ms: float | None = None
    failure: str = ""


@dataclass(slots=True)
class Subject:
    """A model with random weights behind our runner, and its sizes."""

    runner: Any
    files: ModelFiles
    config: EngineConfig
    model: Any
    weight_bytes: int
    bytes_per_token: int
    bandwidth: float
    """Bytes per second that the device's memory gives and takes."""
    num_tokens: int = 128


def run_tests(device: str) -> str:
    """The engine's tests with their models on ``device``; pytest's last line."""
    files = [f"tests/engine/{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRIMARAN_TEST_DEVICE": device}
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=TEST_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"not ended after {TEST_LIMIT_S} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "\n".join([*failed, *done.stdout.splitlines()[-1:]]) or done.stderr[-500:]


def measured_bandwidth(device: Any) -> float:
    """Bytes per second of a copy within the device's memory, read and written."""
    num_bytes = COPY_BYTES if device.type == "cuda" else 2**26
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        wait_for(device)
        began = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        best = min(best, time.perf_counter() - began)
    return 2 * num_bytes / best


def wait_for(device: Any) -> None:
    """Until everything that was launched has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def loaded(config: dict[str, Any], device: Any) -> Generator[Subject]:
    """A model of random weights, made on the device and loaded through the engine's own start."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with torch.device(device), torch.inference_mode():
            made: Any = transformers.AutoConfig.from_pretrained(folder)
            auto: Any = transformers.AutoModelForCausalLM
            model = auto.from_config(made, dtype=torch.bfloat16).eval()
        bandwidth = measured_bandwidth(device)
        files = ModelFiles(folder=folder, decode=lambda _: "", eos_token_ids=frozenset(), max_model_len=1024)
        engine_config = EngineConfig(
            device=device.type, dtype="bfloat16", max_batch_size=max(CLIENTS), max_queue=max(CLIENTS)
        )
        subject = TransformersRunner(engine_config)
        kept, loader.load_model = loader.load_model, lambda *_: model
        try:
            subject.load(files, timed)
        finally:
            loader.load_model = kept
        embedding = model.get_input_embeddings().weight
        weights = sum(each.numel() * each.element_size() for each in model.parameters())
        read = weights - embedding.numel() * embedding.element_size()  # of the embedding a few rows only
        yield Subject(subject, files, engine_config, model, read, subject._cache.bytes_per_token, bandwidth)


@contextmanager
def timed(name: str) -> Generator[None]:
    """Print how long a phase of loading took."""
    began = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - began:.2f} s", file=sys.stderr, flush=True)


async def ours(subject: Subject, name: str, clients: int) -> Row:
    """So many requests at once through the whole engine; the median time of a decode step, and all tokens."""
    subject.runner.load = lambda *_: None  # it is loaded
    engine = StepEngine(subject.config, subject.runner)
    engine.load(subject.files, timed)
    engine.start(lambda error: print(error, file=sys.stderr))
    params = SamplingParams(max_tokens=subject.num_tokens, temperature=0.0, ignore_eos=True)
    try:
        await asyncio.gather(*(_read(engine.submit(_request(number, params, "warm"))) for number in range(clients)))
        began = time.perf_counter()
        streams = [engine.submit(_request(number, params, name)) for number in range(clients)]
        times = await asyncio.gather(*map(_read, streams))
    finally:
        await engine.close()
    took = max(own[-1] for own in times) - began
    gaps = [later - earlier for own in times for earlier, later in pairwise(own)]
    context = PROMPT_TOKENS + subject.num_tokens // 2
    read = subject.weight_bytes + clients * context * subject.bytes_per_token
    return Row(name, clients, sum(map(len, times)) / took, percentile(gaps, 50) * 1000, read / subject.bandwidth * 1000)


def _request(number: int, params: SamplingParams, scope: str) -> GenerationRequest:
    prompt = tuple(3 + (number * 131 + at * 7) % 900 for at in range(PROMPT_TOKENS))
    return GenerationRequest(
        request_id=f"{scope}-{number}-{time.perf_counter_ns()}",
        prompt_token_ids=prompt,
        params=params,
        cache_scope=scope,
    )


async def _read(stream: TokenStream) -> list[float]:
    """When each token came."""
    times: list[float] = []
    async for events in stream:
        for event in events:
            if event.error is not None:
                raise event.error
            times.append(time.perf_counter())
    return times


def theirs(subject: Subject, clients: int) -> Row:
    """transformers' own continuous batching on the same model and prompts, its defaults elsewhere."""
    name = "transformers, continuous batching"
    inputs = [list(_request(number, SamplingParams(max_tokens=1), name).prompt_token_ids) for number in range(clients)]
    options: Any = transformers.GenerationConfig(
        max_new_tokens=subject.num_tokens, min_new_tokens=subject.num_tokens, do_sample=False, eos_token_id=-1
    )
    blocks: Any = {"num_blocks": 64} if subject.model.device.type == "cpu" else {}
    try:
        subject.model.set_attn_implementation("sdpa")
        results = subject.model.generate_batch(
            inputs=inputs,
            generation_config=options,
            record_timestamps=True,
            continuous_batching_config=transformers.ContinuousBatchingConfig(**blocks),
        ).values()
    except Exception as error:  # of a version that differs: what it says is the figure
        return Row(name, clients, 0.0, failure=(str(error) or type(error).__name__).splitlines()[0][:80])
    took = max(each.lifespan[1] for each in results) - min(each.created_time for each in results)
    gaps = [later - earlier for each in results for earlier, later in pairwise(each.timestamps)]
    made = sum(len(each.generated_tokens) for each in results)
    return Row(name, clients, made / took, percentile(gaps, 50) * 1000)


def measure(subject: Subject) -> list[Row]:
    """Everything, smallest first."""
    rows: list[Row] = []
    graphs, config = subject.runner._graphs, subject.runner._config
    kinds = [("trimaran", graphs, True), ("trimaran, each step read at once", graphs, False)]
    if graphs is not None:
        kinds.append(("trimaran, without graphs", None, True))
    for name, used, overlaps in kinds:
        subject.runner._graphs = used
        subject.runner._config = replace(config, overlap=overlaps)
        for clients in CLIENTS:
            rows.append(asyncio.run(ours(subject, name, clients)))
    subject.runner._graphs = subject.runner._cache = None  # its memory belongs to the next one
    gc.collect()
    for clients in CLIENTS:
        rows.append(theirs(subject, clients))
    return rows


def as_table(rows: Sequence[Row]) -> str:
    """``share`` is the bound by what a step took: 1.0 would be the card's memory at full speed."""
    cells = [
        [
            row.name,
            str(row.clients),
            row.failure or f"{row.tokens_per_s:.0f}",
            f"{row.step_ms:.2f}" if row.step_ms else "-",
            f"{row.bound_ms:.2f}" if row.bound_ms else "-",
            f"{row.bound_ms / row.step_ms:.2f}" if row.bound_ms and row.step_ms else "-",
        ]
        for row in rows
    ]
    return table(["server", "requests", "tokens / s", "step, ms", "bound, ms", "share"], cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 without a GPU, unless ``--tiny``."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small model; without a GPU on the CPU")
    parser.add_argument("--no-tests", action="store_true", help="leave out the engine's tests")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available() and not options.tiny:
        sys.stderr.write("no GPU: --tiny tries the command on the CPU\n")
        return 1
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    card = torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU"
    tests = "left out" if options.no_tests else run_tests(device.type)
    config = LLAMA_8B | SMALL | SMALL_HEADS if options.tiny else LLAMA_8B
    with loaded(config, device) as subject:
        subject.num_tokens = 16 if options.tiny else subject.num_tokens
        rows = measure(subject)
    about = f"{card}, torch {torch.__version__}; memory copied at {subject.bandwidth / 1e9:.0f} GB/s; tests: {tests}."
    text = f"{about}\n\n{as_table(rows)}"
    print(text)
    if options.write:
        write_section(PAGE, "gpu", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
