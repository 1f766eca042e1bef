"""Steps launched ahead over a real model: the same tokens, texts and log-probabilities as steps read at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import varlen
from tiny import Loaded, Ready, load, request, tiny_llama, untimed
from torch.nn.attention import varlen as torch_varlen
from torch.utils._python_dispatch import TorchDispatchMode

from serve.engine import flash, graphs, transfer
from serve.engine.kv_cache import KVCache
from serve.engine.sampler import Sampler
from serve.engine.sequence import Sequence
from serve.engine.worker import StepEngine
from serve.types import FinishReason, GenerationRequest, SamplingParams, TokenEvent

CPU = torch.device("cpu")
DRAW = random.Random(11)
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
    {"temperature": 0.0, "max_tokens": 1},
    {"seed": 1, "top_p": 0.7},
    {"seed": 2, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "logprobs": 0},
    {"seed": 3, "frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.5, "min_tokens": 7, "logit_bias": ((2, 30.0), (17, 4.0))},
    {"seed": 4, "stop": ("7", "3>")},
    {"seed": 5, "stop_token_ids": frozenset(range(20, 60))},
]


def spanned(cache: KVCache, *_: Any) -> Any:
    return varlen.varlen if flash.unfit(cache, torch.bfloat16, (9, 0)) is None else None


def record(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Stands for a CUDA graph: each run writes over the result of the one before."""
    result = run().clone()

    def replay() -> None:
        result.copy_(run())

    return replay, result


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "choose", spanned)
        return load(tiny_llama(tmp_path_factory.mktemp("llama")), chunk=16, slots=3, num_threads=1, overlap=True)


class Alternating:
    """A grammar whose next token depends on the last one."""

    def __init__(self) -> None:
        self._last = 5
        self.is_finished = False

    def allowed(self) -> bytes:
        return sum(1 << (self._last * 7 + add) % 300 for add in (1, 2, 3)).to_bytes(40, "little")

    def accept(self, token_id: int) -> None:
        self._last = token_id


def mixed_requests() -> list[GenerationRequest]:
    made = []
    common = [DRAW.randrange(3, 300) for _ in range(30)]
    for number, params in enumerate(PARAMS * 2):
        tail = [DRAW.randrange(3, 300) for _ in range(DRAW.choice((1, 9, 25)))]
        own = SamplingParams(**{"max_tokens": 14, **params})
        made.append(request([*common, *tail] if number % 2 else tail, own))
    return made


async def answers(loaded: Loaded, requests: list[GenerationRequest], *, overlaps: bool) -> tuple[list[Any], int]:
    """What each request is told, and how often a step was launched before the last was read."""
    ready, unread, ahead = Ready(loaded.runner), 0, 0
    ready.overlaps = overlaps

    def launch(batch: Any) -> Any:
        nonlocal unread, ahead
        read = loaded.runner.launch(batch)
        ahead, unread = ahead + unread, unread + 1

        def counted() -> Any:
            nonlocal unread
            unread -= 1
            return read()

        return counted

    ready.launch = launch
    engine = StepEngine(replace(loaded.config, max_queue=99), ready)
    engine.load(loaded.files, untimed)
    engine.start(print)
    try:
        streams = [engine.submit(replace(each, request_id=f"{number}")) for number, each in enumerate(requests)]
        told = await asyncio.gather(*(read_all(stream) for stream in streams))
        assert engine.stats().num_running == 0
    finally:
        await engine.close()
    return told, ahead


async def read_all(stream: Any) -> list[Any]:
    events: list[TokenEvent] = [event async for arrived in stream for event in arrived]
    assert events[-1].finish_reason in {FinishReason.STOP, FinishReason.LENGTH}, events[-1].error
    return [(each.text, each.token_id, each.finish_reason, each.stop, rounded(each)) for each in events]


def rounded(event: TokenEvent) -> list[tuple[int, float]]:
    found = [*event.logprobs, *(event.prompt_logprobs or ()), event.end_logprob]
    return [(each.token_id, round(each.logprob, 2)) for each in found if each is not None]


@pytest.mark.parametrize("with_graphs", [False, True])
async def test_overlapped_steps_equal_steps_read_at_once(loaded, with_graphs):
    if with_graphs:
        with torch.inference_mode():
            loaded.runner._graphs = graphs.DecodeGraphs(loaded.runner._model, loaded.runner._cache, record)
    requests = mixed_requests()
    plain, never = await answers(loaded, requests, overlaps=False)
    overlapped, ahead = await answers(loaded, requests, overlaps=True)
    loaded.runner._graphs = None
    assert overlapped == plain
    assert never == 0
    assert ahead > 20


async def test_grammar_among_others_reads_each_step_first(loaded):
    under = request([9, 9], SamplingParams(max_tokens=9, temperature=0.0, grammar=Alternating))
    requests = [under, *mixed_requests()[:3]]
    plain, _ = await answers(loaded, requests, overlaps=False)
    overlapped, _ = await answers(loaded, requests, overlaps=True)
    assert overlapped == plain


async def test_failed_row_is_no_token_of_the_next_step(loaded):
    """A row of NaN can draw a token beyond the vocabulary, which the step ahead must never look up."""
    last = loaded.vocab_size - 1
    embedding = loaded.runner._model.get_input_embeddings().weight
    kept = embedding[last].clone()
    good = request([7, 8, 9], SamplingParams(max_tokens=9, temperature=0.0))
    expected, _ = await answers(loaded, [good], overlaps=True)
    embedding.data[last] = float("nan")
    try:
        async with loaded.running() as engine:
            bad = engine.submit(request([last, 5], SamplingParams(max_tokens=9, seed=1)))
            fine = engine.submit(good)
            failed = [event async for events in bad for event in events]
            told = await read_all(fine)
    finally:
        embedding.data[last] = kept
    assert type(failed[-1].error).__name__ == "GenerationFailed"
    assert told == expected[0]


def sequence(number: int, params: dict[str, Any]) -> Sequence:
    own = SamplingParams(**{"max_tokens": 9, **params})
    made = GenerationRequest(request_id=f"{number}", prompt_token_ids=(1, 4, number), params=own)
    return Sequence(made, output_token_ids=[4, 5, 5], end_token_ids=frozenset({2}))


def test_sampler_that_does_not_wait_draws_the_same():
    logits = torch.randn(len(PARAMS), 5000, generator=torch.Generator().manual_seed(1)) * 2
    for step in range(3):
        rows = [sequence(number, {"seed": step, **params}) for number, params in enumerate(PARAMS)]
        waiting = Sampler(CPU, 0).sample(logits, rows)
        rows = [sequence(number, {"seed": step, **params}) for number, params in enumerate(PARAMS)]
        assert Sampler(CPU, 0, waits=False).sample(logits, rows).token_ids == waiting.token_ids


class NoWaiting(TorchDispatchMode):
    """Fails where an operation on a GPU would make the host wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = str(func)
        waits = ("_local_scalar_dense", "aten.item", "nonzero", "masked_select", "aten.equal", "is_nonzero")
        assert not any(word in name for word in waits), name
        result = func(*args, **kwargs)
        source = args[1] if name.startswith("aten.copy_") else args[0] if args else None
        target = args[0] if name.startswith("aten.copy_") else result
        if isinstance(source, torch.Tensor) and isinstance(target, torch.Tensor) and source.device != target.device:
            is_plain = len(args) > 2 and args[2]
            assert kwargs.get("non_blocking") or is_plain, f"{name} waits for the device"
        indices = [
            each for each in (args[1] if "aten.index" in name and len(args) > 1 else ()) or () if each is not None
        ]
        assert all(each.device == args[0].device for each in indices if isinstance(each, torch.Tensor)), name
        return result


def test_launching_a_step_on_a_gpu_never_waits_for_it(monkeypatch):
    """With tensors that have a shape and a device but no values, so that looking at one fails."""
    monkeypatch.setattr(transfer, "pinned", lambda values, dtype: torch.tensor(values, dtype=dtype))
    monkeypatch.setattr(transfer, "to_host", lambda *tensors: lambda: pytest.fail("was read"))
    for module in ("sampler", "logprobs"):
        monkeypatch.setattr(f"serve.engine.{module}.to_host", transfer.to_host)
    device = torch.device("meta")
    with torch.inference_mode(), NoWaiting():
        logits = torch.empty(len(PARAMS), 5000, device=device, dtype=torch.bfloat16)
        rows = [sequence(number, params) for number, params in enumerate(PARAMS)]
        sampler = Sampler(device, 0, waits=False)
        sampler.launch(logits, rows)
        for row in rows:
            row.num_pending_tokens = 1
        sampler.launch(logits, rows)
        ids = transfer.on_device([0] * len(rows), device)
        sampler.drawn.fill(ids, rows)
        assert ids.device == device
        pattern = flash.Pattern(flash.Kind.SLIDING, 7)
        spans = flash.spans(pattern, [(2, 0, 9), (0, 30, 37)], 40, device)
        assert {spans.begins.dtype, spans.starts.dtype, spans.used.dtype} == {torch.int32}
        kernel: Any = torch_varlen.varlen_attn
        keys = torch.empty(3, 40, 2, 64, device=device, dtype=torch.bfloat16)
        query = torch.empty(16, 4, 64, device=device, dtype=torch.bfloat16)
        out = flash.attend(kernel, query, keys, keys, spans, None)
    assert (out.shape, out.device, out.dtype) == (query.shape, device, torch.bfloat16)
