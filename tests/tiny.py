"""Tiny random models, and real ones, behind the real engine."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serve import checkpoint
from serve.chat.prompt import ChatFormat
from serve.chat.tokenizer import HubTokenizer
from serve.engine.base import EngineConfig, ModelFiles, TokenStream
from serve.engine.loader import read_config
from serve.engine.runner import TransformersRunner
from serve.engine.worker import StepEngine
from serve.errors import ServeError
from serve.types import FinishReason, GenerationRequest, SamplingParams, Usage

_numbers = itertools.count()


def tiny_llama(folder: Path, **changes: Any) -> Path:
    """A random float32 Llama of three layers with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def untimed(name: str) -> Generator[None]:
    """A phase that nobody times."""
    del name
    yield


@dataclass(frozen=True, slots=True)
class Loaded:
    """A runner with its model, for several engines one after the other."""

    runner: TransformersRunner
    files: ModelFiles
    config: EngineConfig
    chat: ChatFormat | None
    vocab_size: int
    max_model_len: int

    @asynccontextmanager
    async def running(self, deaths: list[ServeError] | None = None) -> AsyncIterator[StepEngine]:
        """An engine that steps until the end of the block."""
        engine = StepEngine(self.config, Ready(self.runner))
        engine.load(self.files, untimed)
        engine.start((deaths if deaths is not None else []).append)
        try:
            yield engine
        finally:
            await engine.close()


class Ready:
    """A loaded runner whose ``prepare`` and ``load`` do nothing."""

    def __init__(self, runner: TransformersRunner) -> None:
        self.num_slots, self.max_model_len, self.launch = runner.num_slots, runner.max_model_len, runner.launch
        self.overlaps = runner.overlaps
        self.reseed = runner.reseed
        self.alone_reason = runner.alone_reason
        self.vocab_size, self.keeps_prefixes = runner.vocab_size, runner.keeps_prefixes

    def prepare(self, files: ModelFiles, phase: Any) -> None:
        pass

    def load(self, files: ModelFiles, phase: Any) -> None:
        pass

    def settle(self) -> None:
        pass


def load(folder: Path, *, chunk: int = 512, slots: int = 4, dtype: str = "float32", **config: Any) -> Loaded:
    """The model in ``folder`` behind a runner on the CPU."""
    raw = read_config(folder)
    device = os.environ.get("TRIMARAN_TEST_DEVICE", "cpu")  # bench/gpu.py runs these tests on a card
    engine_config = EngineConfig(
        device=device, dtype=dtype, max_batch_size=slots, prefill_chunk_tokens=chunk, max_queue=64, **config
    )
    tokenizer = HubTokenizer(folder) if (folder / "tokenizer.json").exists() else None
    files = ModelFiles(
        folder=folder,
        decode=tokenizer.decode if tokenizer else lambda token_ids: "".join(f"<{number}>" for number in token_ids),
        eos_token_ids=checkpoint.eos_token_ids(folder, raw),
        max_model_len=min(checkpoint.context_length(raw) or 256, 1024),
    )
    runner = TransformersRunner(engine_config)
    runner.load(files, untimed)
    runner.settle()
    chat = ChatFormat(tokenizer) if tokenizer else None
    return Loaded(runner, files, engine_config, chat, raw["vocab_size"], runner.max_model_len)


def request(prompt: list[int], params: SamplingParams) -> GenerationRequest:
    """A request with a name of its own."""
    return GenerationRequest(request_id=f"r{next(_numbers)}", prompt_token_ids=tuple(prompt), params=params)


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished request."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    usage: Usage


async def collect(stream: TokenStream) -> Answer:
    """Read a stream to its end; raise its error."""
    token_ids, text = [], ""
    async for events in stream:
        for event in events:
            text += event.text
            if event.token_id is not None:
                token_ids.append(event.token_id)
            if event.error is not None:
                raise event.error
            if event.finish_reason is not None and event.usage is not None:
                return Answer(token_ids, text, event.finish_reason, event.usage)
    raise AssertionError("the stream ended without a finish reason")


def generate_alone(loaded: Loaded, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers' own greedy ``generate`` gives, with its own attention and cache."""
    model = native(loaded)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=sorted(loaded.files.eos_token_ids),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def next_logits(loaded: Loaded, tokens: list[int]) -> torch.Tensor:
    """The logits after ``tokens``, by transformers alone."""
    with torch.inference_mode():
        return native(loaded)(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()


def native(loaded: Loaded) -> Any:
    """The same model with transformers' own attention, loaded once."""
    from transformers import AutoModelForCausalLM

    key = (loaded.files.folder, loaded.config.dtype)
    if key not in _native:
        dtype = getattr(torch, loaded.config.dtype)
        _native[key] = AutoModelForCausalLM.from_pretrained(loaded.files.folder, dtype=dtype)
    return _native[key]


_native: dict[tuple[Path, str], Any] = {}
