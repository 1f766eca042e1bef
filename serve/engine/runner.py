"""Computes one step of an unmodified transformers model.  All tensors live here and below; no asyncio, no HTTP."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serve.checkpoint import stored_dtype
from serve.engine.base import EngineConfig, ModelFiles, Phase, StepOutput
from serve.engine.device import (
    available_memory,
    available_ram,
    choose_device,
    choose_dtype,
    choose_threads,
    import_torch,
)
from serve.engine.scheduler import Batch, Scheduler
from serve.engine.sizing import fit_cache
from serve.engine.worker import StepEngine
from serve.errors import ModelLoadError, OutOfMemory
from serve.read_ahead import reading_ahead
from serve.types import GenerationRequest, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from serve.engine.alone import AloneForward
    from serve.engine.graphs import DecodeGraphs
    from serve.engine.replay import StepProgram

logger = logging.getLogger(__name__)

SHORTAGES = ("not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How allocators outside torch's own CUDA allocator say that there is no memory."""

CPU_SLOTS = 32
CUDA_SLOTS = 64
ALONE_SLOTS = 4
"""Of the fallback: its step costs as much as its sequences one after the other."""
CPU_CACHE_SHARE = 0.5
CUDA_CACHE_SHARE = 0.85


class TransformersRunner:
    """Loads a model, sizes its KV cache, runs batches.

    ``load`` and ``step`` may be called from different threads, one at a time.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.num_slots = 0
        self.max_model_len = 0
        self.vocab_size = 0
        self.keeps_prefixes = True
        self._threads = choose_threads(config.num_threads)
        self._threads_set_for: int | None = None
        self._prepared: Any = None
        self.alone_reason: str | None = None
        self._alone: AloneForward | None = None
        self._graphs: DecodeGraphs | None = None
        self._program: StepProgram | None = None

    def prepare(self, files: ModelFiles, phase: Phase) -> None:
        """Import torch and bring the weights into main memory, for a memory snapshot.

        Raises:
            ModelLoadError: with the reason and the remedy.
        """
        self._import(phase, files)
        import torch  # noqa: PLC0415

        from serve.engine import loader  # noqa: PLC0415

        self._use_threads()
        with phase("weights"), torch.inference_mode():
            self._prepared = loader.load_detached(files, self._config)

    def load(self, files: ModelFiles, phase: Phase) -> None:
        """Load the weights, prove the model on a probe, size the cache, warm up.

        Raises:
            ModelLoadError: with the reason and the remedy.
        """
        if self._prepared is None:
            self._import(phase, files)
        import torch  # noqa: PLC0415

        from serve.engine import loader  # noqa: PLC0415

        self._device = choose_device(self._config.device)
        stored = stored_dtype(loader.read_config(files.folder))
        self._dtype = choose_dtype(self._config.dtype, self._device.value, stored)
        logger.info("Device: %s (%s)", self._device.value, self._device.reason)
        logger.info("Dtype: %s (%s)", self._dtype.value, self._dtype.reason)
        logger.info("Threads: %d (%s)", self._threads.value, self._threads.reason)
        self._use_threads()
        with phase("weights"), torch.inference_mode():
            prepared, self._prepared = self._prepared, None
            self._model = loader.load_model(files, self._dtype.value, self._device.value, self._config, prepared)
        if self._device.value.type == "cpu":
            from serve.engine import linear  # noqa: PLC0415

            with phase("pack"), torch.inference_mode():
                linear.pack(self._model)
        with phase("probe"), torch.inference_mode():
            bytes_per_token = self._examine(files)
        self.vocab_size = int(self._model.config.get_text_config().vocab_size)
        with phase("kv_cache"):
            self._make_cache(bytes_per_token, files.max_model_len)
        self.reseed()
        with phase("warm_up"):
            self._warm_up()
        if self._device.value.type == "cuda" and self._alone is None and self._config.cuda_graphs:
            from serve.engine import graphs  # noqa: PLC0415

            with phase("cuda_graphs"), torch.inference_mode():
                self._graphs = graphs.record_all(self._model, self._cache)

    def settle(self) -> None:
        """Record the model's steps, on a CPU."""
        if self._device.value.type == "cpu" and self._alone is None:
            from serve.engine import replay  # noqa: PLC0415

            self._use_threads()
            self._program = replay.make(self._model, self._cache)

    def reseed(self) -> None:
        """Draw from now on as no other process does."""
        import torch  # noqa: PLC0415

        from serve.engine.sampler import Sampler  # noqa: PLC0415

        torch.manual_seed(secrets.randbits(63))  # pyright: ignore[reportUnknownMemberType]
        self._sampler = Sampler(self._device.value, secrets.randbits(63), waits=not self.overlaps)

    def _import(self, phase: Phase, files: ModelFiles) -> None:
        with reading_ahead(sorted(files.folder.glob("*.safetensors")), available_ram()):
            with phase("import_torch"):
                import_torch()
            with phase("import_transformers"):
                from serve.engine import loader  # noqa: PLC0415

                loader.import_transformers(files)

    def _examine(self, files: ModelFiles) -> int:
        """Choose batches or the fallback; return the bytes that one token takes in the cache."""
        from serve.engine import gate  # noqa: PLC0415
        from serve.engine.alone import AloneForward  # noqa: PLC0415
        from serve.engine.survey import NotBatchable  # noqa: PLC0415

        kept = gate.verdict_file(files, self._dtype.value, self._device.value, self._config.cache_dir)
        try:
            seen = gate.examine(self._model, kept)
        except NotBatchable as reason:
            self.keeps_prefixes = False
            self.alone_reason = f"{type(self._model).__name__} runs one request at a time: {reason}"
            logger.warning("Batching: off; %s", self.alone_reason)
            self._alone = AloneForward(self._model)
            return max(1, self._alone.verify())
        self._cache = seen
        return seen.bytes_per_token

    def _make_cache(self, bytes_per_token: int, model_len: int) -> None:
        """Allocate all layers at once, so that a shortage shows here and not at somebody's request."""
        from serve.engine.rope import fix_frequencies  # noqa: PLC0415

        device = self._device.value
        on_cuda = device.type == "cuda"
        slots = ALONE_SLOTS if self._alone else CUDA_SLOTS if on_cuda else CPU_SLOTS
        size = fit_cache(
            bytes_per_token=bytes_per_token,
            budget=int(available_memory(device) * (CUDA_CACHE_SHARE if on_cuda else CPU_CACHE_SHARE)),
            model_len=model_len,
            default_slots=slots,
            max_batch_size=self._config.max_batch_size,
            max_model_len=self._config.max_model_len,
        )
        logger.info("KV cache: %s", size.reason)
        self.num_slots, self.max_model_len = size.num_slots, size.max_model_len
        if fixed := fix_frequencies(self._model, size.max_model_len):
            logger.info("RoPE: %s, with the frequencies of %d tokens", ", ".join(fixed), size.max_model_len)
        if self._alone:
            return
        try:
            self._cache = self._cache.resized(size.num_slots, size.max_model_len)
        except (RuntimeError, OSError) as error:
            raise ModelLoadError(f"the KV cache cannot be allocated: {size.reason}; {error}") from error

    def _warm_up(self) -> None:
        """Two tokens of one request, so that the first user does not pay for first calls.

        On a GPU with the longest prompt that a step may hold: the memory it needs is proven to be there.
        """
        from serve.engine.gate import not_finite  # noqa: PLC0415

        chunk = self._config.prefill_chunk_tokens
        num_tokens = min(chunk, self.max_model_len - 2) if self._device.value.type == "cuda" else 3
        scheduler = Scheduler(num_slots=1, prefill_chunk_tokens=chunk, eos_token_ids=frozenset())
        params = SamplingParams(max_tokens=2, temperature=1.0, seed=0)
        scheduler.add(GenerationRequest(request_id="warm-up", prompt_token_ids=(1,) * num_tokens, params=params))
        while scheduler.has_work:
            batch = scheduler.schedule()
            try:
                token_ids = self.step(batch).token_ids
            except OutOfMemory as error:
                raise ModelLoadError(
                    f"no memory is left for a step of {num_tokens} tokens; lower SERVE_MAX_BATCH_SIZE"
                ) from error
            if None in token_ids:
                raise not_finite(self._dtype.value)
            scheduler.complete(batch, [token_id or 0 for token_id in token_ids])
            scheduler.release()

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the last one was read: on a GPU, unless it was turned off.

        On a CPU a launched step has ended, and the fallback reads each sequence's tokens on the host.
        """
        wanted = self._device.value.type == "cuda" if self._config.overlap is None else self._config.overlap
        return wanted and self._alone is None

    def step(self, batch: Batch) -> StepOutput:
        """Run a batch to its end.  Raises as :meth:`launch`."""
        return self.launch(batch)()

    def launch(self, batch: Batch) -> Callable[[], StepOutput]:
        """Begin a step; the result waits for one token for each of ``batch.sampled``.

        Raises:
            OutOfMemory: nothing of this step counts; cached keys and values stay valid.
        """
        import torch  # noqa: PLC0415

        self._use_threads()
        try:
            with torch.inference_mode():
                return self._outcome(batch, self._forward(batch))
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in SHORTAGES):
                raise
        # Outside the handler: the exception's frames hold this step's tensors, and the next try needs their memory.
        if self._device.value.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(f"the {self._device.value.type} has no memory left for this request; try again or shorten it")

    def _outcome(self, batch: Batch, logits: Any) -> Callable[[], StepOutput]:
        """Tokens from the first rows of ``logits``, log-probabilities of prompts from the others."""
        from serve.engine.logprobs import token_logprobs  # noqa: PLC0415
        from serve.engine.transfer import on_device  # noqa: PLC0415

        sampled = batch.sampled
        read = self._sampler.launch(logits[: len(sampled)], sampled) if sampled else lambda: StepOutput([])
        prompts: dict[int, Callable[[], list[TokenLogprob]]] = {}
        begin = len(sampled)
        for index, chunk in enumerate(batch.chunks):
            num_top, predicted = chunk.sequence.params.prompt_logprobs, chunk.predicted
            if num_top is not None:
                rows = logits[begin : begin + len(predicted)]
                prompts[index] = token_logprobs(rows, on_device(predicted, rows.device), [num_top] * len(predicted))
                begin += len(predicted)
        if not prompts:
            return read
        return lambda: replace(read(), prompt_logprobs={index: found() for index, found in prompts.items()})

    def _forward(self, batch: Batch) -> Any:
        """Logits ``[n, vocab_size]``: a row of each sampled sequence, then those that predict asked prompt tokens."""
        if self._alone:
            return self._alone.logits(batch)
        if self._graphs is not None and not batch.chunks:
            return self._graphs.logits(batch, self._sampler.drawn)
        if self._program is not None:
            return self._program.logits(batch, self._sampler.drawn)
        from serve.engine.packed import forward  # noqa: PLC0415

        return forward(self._model, batch, self._cache, self._sampler.drawn)

    def _use_threads(self) -> None:
        """OpenMP's thread count belongs to the calling thread."""
        import threading  # noqa: PLC0415

        import torch  # noqa: PLC0415

        if self._threads_set_for != threading.get_ident():
            torch.set_num_threads(self._threads.value)
            self._threads_set_for = threading.get_ident()


class TransformersEngine(StepEngine):
    """A transformers model behind the step loop."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, TransformersRunner(config))
