"""What a model needs in memory, found without its weights: configuration, headers of files, a run without values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from serve import checkpoint, hub, weights
from serve.cards import FLOAT8, Card
from serve.errors import ConfigError, ModelLoadError
from serve.source import DEFAULT_MAX_MODEL_LEN
from serve.weight_files import StoredTensor, header_size, read_header, stored_tensors
from trimaran.plan.dry_run import DryRun, dry_run
from trimaran.plan.gguf_need import gguf_need

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Of the formats that a loader turns into the one that it computes in; others stay as they are."""

PREFILL_CHUNK_TOKENS = 512
FIRST_READ = 2**18
EXACT, FORMULA = "dry run without weights", "formula"

UNPACKED = frozenset({"mxfp4"})
"""Formats whose kernels (the package ``kernels``) no image of ours has: transformers unpacks them everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One model's appetite.  Bytes are of the loaded model, ``value_bytes`` a number; ``stored_bytes`` of its files.

    ``kv_bytes_per_sequence`` is what one sequence of ``context`` tokens takes of the engine's cache, and
    ``own_cache_bytes`` what transformers' own cache would take for it (0: unknown).  ``cpu_refusal`` says why a
    quantised checkpoint cannot be served without a GPU; empty: it can.
    """

    model: str
    num_parameters: int
    stored_bytes: int
    weight_bytes: int
    quantization: str
    adapter_bytes: int
    context: int
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    own_cache_bytes: int
    method: str
    runs_in_batches: bool
    hidden_size: int
    vocab_size: int
    value_bytes: int = 2
    cpu_refusal: str = ""
    notes: tuple[str, ...] = ()

    def weight_bytes_on(self, card: Card | None) -> int:
        """What the weights take on a card; None is a CPU.  What nothing computes in is unpacked when it is loaded."""
        lacks_fp8 = card is None or card.capability < FLOAT8
        if self.quantization in UNPACKED or (self.quantization in {"fp8", "mxfp8"} and lacks_fp8):
            return max(self.weight_bytes, self.value_bytes * self.num_parameters)
        return self.weight_bytes

    def activation_bytes(self, num_sequences: int) -> int:
        """What a step needs beside weights and cache: a chunk of a prompt, or everybody's logits."""
        tokens = PREFILL_CHUNK_TOKENS if self.runs_in_batches else self.context
        return max(tokens * self.hidden_size * 8 * 2, num_sequences * self.vocab_size * 4)


def examine(
    model: str, revision: str | None, context: int | None, gguf_file: str | None = None, dtype: str = "auto"
) -> Need:
    """Find out what a model needs, without downloading or reading weights.

    Args:
        model: A folder, a GGUF file, or a Hub id; also of a LoRA adapter.
        revision: Branch, tag or commit at the Hub.
        context: Tokens of a sequence; None: the model's, at most what the server takes without a setting.
        gguf_file: A file of a repository of GGUF files.
        dtype: As ``SERVE_DTYPE`` has it: ``float32`` takes twice as much as anything else.

    Raises:
        ServeError: it cannot be found, read or served.
    """
    if gguf_file is not None or model.endswith(".gguf"):
        return gguf_need(model, revision, context, gguf_file)
    weights.check_name(model, "MODEL")
    source = weights.locate(model, revision)
    own, longest = checkpoint.context_length(source.config), checkpoint.longest_context(source.config)
    context = chosen_context(context, own, longest)
    checkpoint.quantization_packages(source.config, "cuda")  # refuses what is served nowhere
    stored = list(stored_in(source).values())
    width = 4 if dtype == "float32" else 2
    need = _from_config(source.config, model, context, stored, width)
    if not need.quantization:  # quantised weights are loaded as they are stored
        need = replace(need, weight_bytes=sum(_loaded_bytes(tensor, width) for tensor in stored))
    ran = dry_run(source.folder, "float32" if width == 4 else "bfloat16", context)
    need = _after_run(need, ran) if isinstance(ran, DryRun) else _with_note(need, f"cache by formula: {ran}")
    if source.adapter_source is not None:
        size = sum(_size(tensor) for tensor in stored_in(source.adapter_source).values())
        need = _with_note(replace(need, adapter_bytes=size), "the LoRA adapter is merged: weights as of its base")
    return need


def chosen_context(wanted: int | None, own: int | None, longest: int | None) -> int:
    """Tokens of a sequence: as wanted, else the model's ``own``, at most what the server takes without a setting.

    Raises:
        ConfigError: it is more than the ``longest`` that the model can do.
    """
    if wanted and longest and wanted > longest:
        raise ConfigError(f"--context {wanted} exceeds the model's context of {longest} tokens; lower it")
    return wanted or min(own or DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_MODEL_LEN)


def weight_bytes(model: str, revision: str | None) -> int:
    """What a model's weights take of memory, from the headers of its files alone.

    Raises:
        ServeError: it cannot be found or read.
    """
    return sum(_loaded_bytes(tensor) for tensor in stored_in(weights.locate(model, revision)).values())


def stored_in(source: weights.ModelSource) -> dict[str, StoredTensor]:
    """All tensors of a model by name, from the headers of its files; those at the Hub by range requests.

    Raises:
        ServeError: a header cannot be read.
    """
    found: dict[str, StoredTensor] = {}
    for name in source.weight_files:
        path = source.folder / name
        if path.exists():
            header = read_header(path)
        else:
            start = hub.read_start(source.model, source.revision, name, FIRST_READ)
            end = 8 + header_size(path, start)
            whole = start if end <= len(start) else hub.read_start(source.model, source.revision, name, end)
            header = whole[8:end]
        found |= stored_tensors(path, header)
    return found


def _size(tensor: StoredTensor) -> int:
    return tensor.span[1] - tensor.span[0]


def _loaded_bytes(tensor: StoredTensor, width: int = 2) -> int:
    wide = BYTES.get(tensor.dtype)
    return _size(tensor) if wide is None else _size(tensor) // wide * width


def _after_run(need: Need, ran: DryRun) -> Need:
    per_sequence = need.context * ran.kv_bytes_per_token if not ran.reason else ran.own_cache_bytes
    need = replace(
        need,
        num_parameters=ran.num_parameters,
        weight_bytes=need.weight_bytes if need.quantization else ran.weight_bytes,
        kv_bytes_per_token=ran.kv_bytes_per_token or per_sequence // need.context,
        kv_bytes_per_sequence=per_sequence,
        own_cache_bytes=ran.own_cache_bytes,
        method=EXACT,
        runs_in_batches=not ran.reason,
    )
    return _with_note(need, f"one request at a time: {ran.reason}") if ran.reason else need


def _with_note(need: Need, note: str) -> Need:
    return replace(need, notes=(*need.notes, note))


def _from_config(config: Mapping[str, Any], model: str, context: int, stored: list[StoredTensor], width: int) -> Need:
    nested = config.get("text_config")
    text = cast("Mapping[str, Any]", nested) if isinstance(nested, dict) else config
    heads = _number(text, "num_attention_heads", "n_head", "n_heads")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    head_dim = _number(text, "head_dim") or (hidden // heads if heads else 0)
    layers = _number(text, "num_hidden_layers", "n_layer", "n_layers")
    per_token = 2 * layers * (_number(text, "num_key_value_heads") or heads) * head_dim * width
    total = sum(_size(tensor) for tensor in stored)
    return Need(
        model=model,
        num_parameters=sum(_num_values(tensor) for tensor in stored),
        stored_bytes=total,
        weight_bytes=total,
        quantization=checkpoint.quantization_method(config),
        adapter_bytes=0,
        context=context,
        kv_bytes_per_token=per_token,
        kv_bytes_per_sequence=per_token * context,
        own_cache_bytes=0,
        method=FORMULA,
        runs_in_batches=True,
        hidden_size=hidden,
        vocab_size=checkpoint.vocab_size(config) or 0,
        value_bytes=width,
        cpu_refusal=_cpu_refusal(config),
    )


def _cpu_refusal(config: Mapping[str, Any]) -> str:
    try:
        checkpoint.quantization_packages(config, "cpu")
    except ModelLoadError:
        return f"has no GPU, which {checkpoint.quantization_method(config)} needs"
    return ""


def _num_values(tensor: StoredTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _number(config: Mapping[str, Any], *names: str) -> int:
    found = next((value for name in names if isinstance(value := config.get(name), int)), 0)
    return max(0, int(found))
